"""Memory of a machine that nothing here compiles for, added up by hand, against what XLA says of the same
arrays elsewhere."""

import dataclasses
from pathlib import Path

import jax
import pytest

from opd_jax import config, parallel, training
from opd_jax._config_io import flatten
from opd_jax.training._plan_by_hand import _chunk, _layer
from opd_jax.training._plan_programs import shapes
from opd_jax.training._run import _neutral

ROOT = Path(__file__).parents[2]
DEMO = "configs/demo.yaml"
QWEN = ["--student.path", "configs/models/qwen3_1.7b", "--teacher.path", "configs/models/qwen3_8b"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_arguments_and_outputs_are_those_that_xla_counts(quick_compilation):
    settings = config.load(DEMO, ["--steps", "1"])
    by_hand = training.plan(settings, parallel.topology("h100:8"))
    compiled = training.plan(settings, jax.devices()[:8])
    assert by_hand.kind == "NVIDIA H100 80GB HBM3" and by_hand.fits and compiled.fits is None
    for ours, xlas in zip(by_hand.programs, compiled.programs, strict=True):
        assert ours.by_hand and not xlas.by_hand and ours.name == xlas.name
        there = xlas.arguments + xlas.others
        assert ours.arguments + ours.others == pytest.approx(there, rel=0.01, abs=2000)  # scalars
        if ours.name != "update":
            assert ours.outputs == pytest.approx(xlas.outputs, rel=0.02, abs=2000)


def test_temporaries_in_closed_form():
    """Qwen3-1.7B (width 2048, MLP 6144, vocabulary 151,936) on 2 x 4 devices, bfloat16."""
    words = [*QWEN, "--mesh.fsdp", "2", "--mesh.tensor", "4", "--loss_chunk", "1024"]
    mesh = parallel.make_mesh(1, 2, 4, devices=jax.devices()[:8])
    run = shapes(config.load("configs/qwen3_1.7b_from_8b.yaml", words), mesh)
    assert _layer(run.student, run, 3, 100) == 2 * 3 * 100 * (3 * 2048 + 3 * 6144 / 4)
    part = 151936 / 4
    heads = 2 * part * (2048 + 4096) + 4 * part * 2048
    assert _chunk(run) == 4 * 5 * 1024 * part + heads


@pytest.mark.parametrize("name", ["qwen3_1.7b_from_8b_h100", "qwen3_8b_from_32b_h100"])
def test_configs_for_eight_gpus_fit_with_a_reserve(name):
    """By hand is up to 15% below XLA's own sum where both are known (README)."""
    sizes = name.removeprefix("qwen3_").removesuffix("_h100").split("_from_")
    words = [
        f"--{who}.path=configs/models/qwen3_{size}"
        for who, size in zip(("student", "teacher"), sizes, strict=True)
    ]
    found = training.plan(config.load(f"configs/{name}.yaml", words), parallel.topology("h100:8"))
    assert max(each.peak for each in found.programs) < 0.85 * 73.2 * 2**30


def test_what_does_not_fit_is_told(monkeypatch):
    words = [*QWEN, "--mesh.fsdp", "2", "--mesh.tensor", "4"]
    found = training.plan(config.load("configs/qwen3_1.7b_from_8b.yaml", words), parallel.topology("h100:8"))
    score = next(each for each in found.programs if each.name == "score")
    assert found.fits is False and score.fits is False
    # Hidden states of 512 rows of 16,384 tokens, 4096 wide.
    assert score.outputs == 512 * 16384 * 4096 * 2


def test_more_gpus_than_virtual_devices():
    with pytest.raises(ValueError, match=r"no topology 'h100:16'.*h100: 1, 2, 4, 8"):
        parallel.topology("h100:16")


@pytest.mark.parametrize("name", ["qwen3_1.7b_from_8b", "qwen3_8b_from_32b"])
def test_the_run_on_gpus_is_the_run_on_tpus(name):
    """But for what makes room, which leaves the result as it is, and an int8 teacher for the largest."""
    one, other = (
        flatten(dataclasses.asdict(config.load(f"configs/{file}.yaml"))) for file in (name, f"{name}_h100")
    )
    differing = {key for key in one | other if one.get(key) != other.get(key)} - {"run_dir"}
    allowed = {"teacher.dtype", "optimizer.mu_dtype"} if "32b" in name else set()
    assert {key for key in differing if not _neutral(key)} <= allowed
