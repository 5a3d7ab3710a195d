"""Small runs of the whole loop."""

import dataclasses
import functools

import jax
import pytest

from opd_jax import config as configs
from opd_jax.training import _setup
from tests.training.runs import make_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return make_folder(folder / "student", 0), make_folder(folder / "teacher", 1, width=24)


@pytest.fixture
def one_device(monkeypatch):
    """The virtual devices compete for two cores: only tests of the mesh use all of them."""
    make_mesh = _setup.make_mesh
    monkeypatch.setattr(_setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:1]))
    return monkeypatch


@pytest.fixture
def make(folders, tmp_path, one_device):
    """Builds a small config; keyword arguments are dotted with two underscores."""

    def build(run: str = "run", **changes) -> configs.Config:
        student, teacher = folders
        settings = configs.Config(
            steps=4,
            batch_size=8,
            max_new_tokens=8,
            run_dir=str(tmp_path / run),
            student=configs.StudentConfig(path=student),
            teacher=configs.TeacherConfig(path=teacher),
            data=configs.DataConfig(source="arithmetic", options=dict(seed=1, size=64), max_prompt_length=16),
            optimizer=configs.OptimizerConfig(learning_rate=1e-2),
        )
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            if section:
                value = dataclasses.replace(getattr(settings, section), **{name: value})
            settings = dataclasses.replace(settings, **{section or name: value})
        return settings

    return build
