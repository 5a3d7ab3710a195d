"""Several processes on loopback, each with some of the devices, against one process with all of them."""


import pytest

from tests.training.runs import make_folder

_SMALL = dict(steps=3, batch_size=8, max_new_tokens=8, micro_batches=1, seed=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return make_folder(folder / "student", 0, vocab=None), make_folder(folder / "teacher", 1, width=24)
