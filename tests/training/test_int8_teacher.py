"""A teacher with int8 weights in a run, in a plan, in a cache, and in what XLA makes of it."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import opd_jax
from opd_jax import config as configs
from opd_jax import models, training
from opd_jax.training._batches import make_batch
from opd_jax.training._logging import Display
from opd_jax.training._memory import memory_table
from opd_jax.training._setup import prepare
from opd_jax.training._step import completion_states
from tests.training.runs import read_metrics

DEMO = Path(opd_jax.__file__).parent / "demo"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def demo(make):
    """Builds a config of the demo's models."""

    def build(run: str, dtype: str, **changes):
        teacher = configs.TeacherConfig(path=str(DEMO / "teacher"), dtype=dtype)
        return make(run, student=configs.StudentConfig(path=str(DEMO / "base")), teacher=teacher, **changes)

    return build


def in_the_table(text: str, name: str) -> float:
    return float(re.search(rf"{name} +([\d.]+)", text)[1])


@pytest.mark.slow
def test_scoring_and_the_update_see_the_quantised_teacher(demo):
    settings = demo("run", "int8", tokens__weights="prefix_drift", batch_size=16, micro_batches=2)
    with Display(1) as display:
        setup, state = prepare(settings, display)
        half = memory_table(setup, state)
        whole = memory_table(*prepare(demo("run", "bfloat16"), display))
    # A scale of 4 bytes to 96 or 256 int8 values, and the norms as they were.
    part = in_the_table(half, "teachers and reference") / in_the_table(whole, "teachers and reference")
    assert 0.5 <= part < 0.56
    batch, _ = make_batch(setup, state.params, 0, jax.random.key(0), lambda _: None)
    batch, params, hidden = setup.scorer.score(state, batch)
    looked = setup.scorer.measure(state, params, batch, hidden)
    model = models.load(DEMO / "teacher", dtype="int8")
    states = completion_states(model, batch.prompts, batch.prompt_lengths, batch.completions)
    logits = jax.nn.log_softmax(model.unembed(states))
    direct = np.take_along_axis(np.asarray(logits), np.asarray(batch.completions)[..., None], 2)[..., 0]
    mask = np.asarray(batch.mask)
    # The same bfloat16 computation, compiled otherwise.
    np.testing.assert_allclose(np.asarray(looked["teacher_log_probs"])[mask], direct[mask], atol=0.03)
    _, metrics = setup.update(state, params, batch, hidden, setup.frozen)
    assert float(metrics["kl"]) == pytest.approx(float(np.asarray(looked["kl"])[mask].mean()), rel=1e-5)
    assert float(metrics["finite"]) == 1


@pytest.mark.slow
def test_a_cache_of_it_says_the_same(demo, tmp_path):
    sizes = dict(loss="forward_kl", lmbda=0.0, steps=1, batch_size=16, max_new_tokens=32)
    live = demo("live", "int8", **sizes, loss_top_k=6, loss_support="teacher")
    folder = str(tmp_path / "cache")
    cached = demo("cached", "int8", **sizes)
    teacher = dataclasses.replace(cached.teacher, cache=folder, cache_top_k=6)
    cached = dataclasses.replace(cached, teacher=teacher)
    training.cache_teacher(cached)
    losses = []
    for each in (live, cached):
        training.train(each)
        losses.append(read_metrics(each.run_dir)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # bfloat16, and the cache holds float16


def test_a_student_is_never_int8(tmp_path):
    (tmp_path / "run.yaml").write_text("student: {path: a, dtype: int8}\nteacher: {path: b, dtype: int8}\n")
    with pytest.raises(ValueError, match=r"student\.dtype: .*got 'int8'.*a student is trained") as error:
        configs.load(tmp_path / "run.yaml")
    assert "teacher.dtype" not in str(error.value)


_PROGRAM = r"""
import re, sys
import jax, jax.numpy as jnp, optax
from flax import nnx
from opd_jax import models, parallel
from opd_jax.config import Config
from opd_jax.training._objectives import make_objective
from opd_jax.training._step import Batch, State, make_score, make_update

target = sys.argv[1]
jax.config.update("jax_num_cpu_devices", 4)
mesh = parallel.make_mesh(1, 2, 2, parallel.topology("v5e:2x2") if target == "tpu" else jax.devices())
assert mesh.devices.flat[0].platform == target
rows = parallel.batch_sharding(mesh)
give = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
B, N, width = 8, 64, 512
shared = dict(architecture="Qwen3ForCausalLM", qk_norm=True, vocab_size=4096, head_width=64)
teacher = models.DecoderConfig(width=width, layers=8, heads=8, kv_heads=4, ff_width=2048, **shared)
student = models.DecoderConfig(width=64, layers=1, heads=2, kv_heads=2, ff_width=64, **shared)

def placed(config, dtype):
    graphdef, params = nnx.split(models.abstract(config, dtype))
    place = parallel.param_shardings(params, mesh)
    shape = lambda p, sharding: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding)
    return graphdef, jax.tree.map(shape, params, place)

def compiled(function, *args):
    return function.trace(*args).lower(lowering_platforms=(target,)).compile()

ints = lambda *shape: give(shape, jnp.int32)
batch = Batch(ints(B, N), ints(B), ints(B, N), give((B, N), jnp.bool_), give((B, N), jnp.float32))
with parallel.compiling_for(target), jax.set_mesh(mesh):
    graphdef, params = placed(teacher, jnp.int8)
    done = compiled(make_score(graphdef, 2), params, batch)
    layers = sum(a.size for a in jax.tree.leaves(params.layers) if a.dtype == jnp.int8) / mesh.size
    wide = re.findall(r"(?:bf16|f32)\[8,(?:128|256|512|1024|2048),\d+\]", done.as_text())
    memory = done.memory_analysis()
    print("score", layers, memory.argument_size_in_bytes, memory.temp_size_in_bytes, len(wide))
    own, trained = placed(student, jnp.float32)
    state = State(trained, jax.eval_shape(optax.sgd(1e-3).init, trained))
    update = make_update(own, [graphdef], optax.sgd(1e-3), make_objective(Config()), loss_chunk=64)
    hidden = give((B, N, width), jnp.bfloat16)
    text = compiled(update, state, (params,), batch, (hidden,)).as_text()
    gathers = [line for line in text.splitlines() if "all-gather" in line]
    print("update", *(sum(f"= {kind}[512,2048]" in line for line in gathers) for kind in ("s8", "bf16")))
"""


@pytest.mark.parametrize(
    "target", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("tpu", marks=pytest.mark.tpu)]
)
def test_layers_are_widened_one_at_a_time(target):
    """In its own process: libtpu reads the environment when it is loaded."""
    if target == "tpu":
        pytest.importorskip("libtpu")
    path = os.pathsep.join([str(DEMO.parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = os.environ | dict(JAX_PLATFORMS="cpu", PYTHONPATH=path, ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    command = [sys.executable, "-c", _PROGRAM, target]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)
    score, update = (list(map(float, line.split()[1:])) for line in done.stdout.decode().splitlines())
    weights, arguments, temporaries, wide = score
    assert weights < arguments < 1.5 * weights
    # A bfloat16 copy of all layers would be 2 * weights.
    assert wide == 0 and temporaries < 1.5 * weights
    if target == "tpu":  # the teacher's unembedding is gathered as it is; XLA:CPU widens it before
        assert update[0] > 0 and update[1] == 0
