"""A run with checkpoints on disk."""

import pytest

from tests.analysis.folders import random_tensors, write_folder


@pytest.fixture(scope="session")
def way(tmp_path_factory):
    """A base and three checkpoints of a run, at steps 10, 20 and 40: folders, and what is in them."""
    root = tmp_path_factory.mktemp("way")
    base = random_tensors(0)
    noise = [random_tensors(seed, 0.05) for seed in (1, 2, 3)]
    final = random_tensors(4)
    tensors = {0: base}
    for step, extra, size in zip((10, 20, 40), noise, (0.1, 0.4, 1.0), strict=True):
        tensors[step] = {name: base[name] + size * (final[name] + extra[name]) for name in base}
    write_folder(root / "base", base)
    for step in (10, 20, 40):
        write_folder(root / "run" / f"checkpoint-{step}", tensors[step])
    return root, tensors
