"""A teacher on devices of its own trains the student that it trains on the student's."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import opd_jax
from opd_jax import config as configs
from opd_jax import models, training
from opd_jax.parallel import make_mesh
from opd_jax.training import _teacher_mesh
from opd_jax.training._batches import make_batch
from opd_jax.training._logging import Display
from opd_jax.training._memory import memory_table
from opd_jax.training._setup import prepare
from opd_jax.training._teacher_mesh import _used_by_unembed, split_devices
from tests.training.runs import read_metrics, read_weights

DEMO = Path(opd_jax.__file__).parent / "demo"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def spread(make, one_device):
    """Builds a config with the student on `devices` devices and the teacher on `mesh`, or on the same."""
    one_device.undo()

    def build(run: str, devices: int, mesh: configs.TeacherMeshConfig | None, **changes):
        first = jax.devices()[: devices + (0 if mesh is None else mesh.data * mesh.fsdp * mesh.tensor)]
        one_device.setattr("opd_jax.training._setup.make_mesh", functools.partial(make_mesh, devices=first))
        split = functools.partial(split_devices, devices=first)
        one_device.setattr("opd_jax.training._setup.split_devices", split)
        changes = dict(batch_size=24, steps=2, optimizer__eps=0.1) | changes
        return make(run, teacher__mesh=mesh, **changes)

    return build


def assert_same_run(one, other):
    losses, weights = [], []
    for settings in (one, other):
        losses.append([line["loss"] for line in read_metrics(settings.run_dir) if "loss" in line])
        weights.append(read_weights(Path(settings.run_dir) / "model"))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    for name, expected in weights[0].items():
        np.testing.assert_allclose(weights[1][name], expected, atol=1e-5, err_msg=name)


EVALUATED = dict(
    evaluation__prompts=12,
    evaluation__options=dict(seed=5),
    evaluation__batch_size=12,
    evaluation__teacher=True,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "sizes", "changes"), [(4, dict(fsdp=2, tensor=2), EVALUATED), (6, dict(data=2), {})]
)
def test_losses_and_weights_are_those_of_the_shared_mesh(spread, capsys, devices, sizes, changes):
    shared = spread("shared", devices, None, **changes)
    expected = training.train(shared)
    mesh = configs.TeacherMeshConfig(**sizes)
    apart = spread("apart", devices, mesh, **changes)
    capsys.readouterr()
    found = training.train(apart)
    assert f"on each of {np.prod(list(sizes.values()))} devices of the teacher" in capsys.readouterr().out
    assert_same_run(shared, apart)
    assert found.teacher == pytest.approx(expected.teacher)
    # A resumed run may bring the teacher back.
    training.train(spread("apart", devices, None, **changes | dict(steps=3)))


SEARCH = configs.ForesightConfig(
    extrapolate=configs.ExtrapolateConfig(schedule="steps", steps=(1,), prompts=8, factors=(2.0, 4.0))
)


@pytest.mark.slow
def test_a_search_asks_the_teacher_there(spread):
    changes = dict(foresight=SEARCH, tokens__weights="prefix_drift")
    shared = spread("shared", 2, None, **changes)
    training.train(shared)
    apart = spread("apart", 2, configs.TeacherMeshConfig(fsdp=4), **changes)
    training.train(apart)
    assert_same_run(shared, apart)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_only_the_unembedding_is_where_the_student_is(spread, dtype):
    settings = spread("run", 4, configs.TeacherMeshConfig(fsdp=4), steps=1, teacher__dtype=dtype)
    with Display(1) as display:
        setup, state = prepare(settings, display)
    ours, theirs = jax.devices()[:4], jax.devices()[4:8]
    assert all(leaf.sharding.device_set == set(theirs) for leaf in jax.tree.leaves(nnx.state(setup.teacher)))
    with jax.set_mesh(setup.mesh):
        batch, _ = make_batch(setup, state.params, 0, jax.random.key(0), lambda _: None)
        batch, (head,), hidden = setup.scorer.score(state, batch)
        lowered = setup.update.lower(state, (head,), batch, hidden, None)
    for leaf in jax.tree.leaves((state, head, batch, hidden)):
        assert leaf.sharding.device_set == set(ours)
    tied = setup.teacher.config.tie_embeddings
    kept = ["embedding"] if tied else ["head.kernel"]
    kept += [f"{kept[0]}_scale"] if dtype == "int8" else []
    whole = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(setup.teacher))}
    for path, leaf in nnx.to_flat_state(head):
        name = ".".join(path)
        if name in kept:
            np.testing.assert_array_equal(np.asarray(leaf[...]), np.asarray(whole[name]))
        else:
            assert leaf[...].size == 0, name
    # Of the teacher the program takes the unembedding alone: no [2 layers, 24, ...] is among its arguments.
    text = lowered.as_text()
    shapes = re.findall(r"%arg\d+: tensor<([^>]*)>", text[text.index("@main(") :].partition(") -> ")[0])
    assert shapes.count("24x19xi8" if dtype == "int8" else "24x19xf32") == 1
    assert len(shapes) == len(jax.tree.leaves((state, batch, hidden))) + len(kept)
    assert not any(each.startswith("2x24x") for each in shapes)
    table = memory_table(setup, state)
    assert "on each of 4 devices (data=1 fsdp=4 tensor=1)" in table
    there = table[table.index("on each of 4 devices of the teacher (data=1 fsdp=4 tensor=1)") :]
    assert "teacher " in there and "optimizer" not in there


def test_what_unembed_reads(make_model, bare_model):
    def used(model):
        graphdef, params = nnx.split(model)
        names = [".".join(path) for path, _ in nnx.to_flat_state(params)]
        return [name for name, read in zip(names, _used_by_unembed(graphdef, params), strict=True) if read]

    assert used(make_model(tie_embeddings=False)) == ["head.kernel"]
    assert used(make_model(tie_embeddings=True)) == ["embedding"]
    assert used(models.load(DEMO / "teacher", dtype="int8")) == ["head.kernel", "head.kernel_scale"]
    assert used(bare_model) == []  # its logits are what comes back


def test_devices_that_do_not_add_up(make):
    def split(**changes):
        return split_devices(make(**changes), jax.devices()[:8])

    four = configs.TeacherMeshConfig(fsdp=4)
    student, teacher = split(teacher__mesh=four)
    assert student.shape == teacher.shape == dict(data=1, fsdp=4, tensor=1)
    assert list(teacher.devices.flat) == jax.devices()[4:8]
    with pytest.raises(ValueError, match=r"data 1 x fsdp 8 x tensor 1 takes 8 of 8 devices.*leaves none"):
        split(teacher__mesh=configs.TeacherMeshConfig(fsdp=8))
    with pytest.raises(ValueError, match=r"needs 8 devices, but there are 4; .* takes 4 of 8 devices"):
        split(teacher__mesh=four, mesh=configs.MeshConfig(fsdp=8))
    with pytest.raises(ValueError, match=r"micro_batches is 2: .* teacher.mesh.fsdp = 4 .* multiple of 4"):
        split(teacher__mesh=four, micro_batches=4)


def test_several_processes_are_refused(make, monkeypatch):
    monkeypatch.setattr(_teacher_mesh.jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="works in one process, but there are 4"):
        split_devices(make(teacher__mesh=configs.TeacherMeshConfig()), jax.devices()[:8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher=dict(mesh=dict(fsdp=-1))), r"teacher\.mesh\.fsdp is -1; it must be at least 1"),
        (dict(teacher=dict(mesh={}, cache="x")), r"teacher\.mesh and teacher\.cache exclude each other"),
        (dict(teacher=dict(mesh={}, align=True)), r"teacher\.mesh and teacher\.align exclude each other"),
        (dict(teacher=dict(mesh={}, ema=0.5)), r"teacher\.mesh and teacher\.ema exclude each other"),
        (dict(teachers={"a": {"path": "b"}}, teacher=dict(mesh={})), "teacher and teachers are both set"),
        (dict(objective="sft", teacher=dict(mesh={})), r"teacher\.mesh is set but objective sft has no"),
        (dict(teacher=dict(mesh=4)), r"teacher\.mesh: is a section of keys, got 4"),
        (dict(teacher=dict(mesh=dict(fdsp=4))), r"teacher\.mesh\.fdsp.*did you mean 'teacher\.mesh\.fsdp'"),
    ],
)
def test_what_does_not_go_with_it(changes, message, tmp_path):
    text = dict(student=dict(path="a"), data=dict(source="arithmetic")) | changes
    yaml = pytest.importorskip("yaml")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(ValueError, match=message):
        configs.load(tmp_path / "run.yaml").validate()


def test_the_command_line_can_set_and_unset_it(tmp_path):
    (tmp_path / "run.yaml").write_text("teacher: {path: b, mesh: {tensor: 2}}")
    words = ["--teacher.mesh.fsdp", "4"]
    config = configs.load(tmp_path / "run.yaml", words)
    assert config.teacher.mesh == configs.TeacherMeshConfig(fsdp=4, tensor=2)
    (tmp_path / "again.yaml").write_text(configs.dump(config))
    assert configs.load(tmp_path / "again.yaml").teacher == config.teacher
    assert configs.load(tmp_path / "run.yaml", ["--teacher.mesh", "null"]).teacher.mesh is None
