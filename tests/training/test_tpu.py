"""The programs of a run, compiled ahead of time for a TPU topology; nothing runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import opd_jax
from tests.training.hlo import Sent

_PROGRAM = """
import json, re
import jax, jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from opd_jax import models, rollout
from opd_jax.config import Config, ForesightConfig, OptimizerConfig, TrackConfig
from opd_jax.parallel import batch_sharding, compiling_for, make_mesh, param_shardings, topology
from opd_jax.rollout import _generate
from opd_jax.training._objectives import make_objective
from opd_jax.training._optimizer import make_optimizer, optimizer_shardings
from opd_jax.training._step import Batch, State, make_score, make_update
from tests.training.hlo import collectives

mesh = make_mesh(1, 4, 2, devices=topology("v5e:2x4"))
assert mesh.devices.flat[0].platform == "tpu"
config = models.DecoderConfig(
    vocab_size=6144, width=256, layers=3, heads=8, kv_heads=4, head_width=128, ff_width=512,
    qk_norm=True, architecture="Qwen3ForCausalLM")
rows, whole = batch_sharding(mesh), NamedSharding(mesh, P())
give = lambda shape, dtype, sharding: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

def shapes(dtype, remat="block"):
    graphdef, params = nnx.split(models.abstract(config, dtype, remat=remat))
    place = param_shardings(params, mesh)
    return graphdef, jax.tree.map(lambda p, s: give(p.shape, p.dtype, s), params, place)

graphdef, params = shapes(jnp.float32)
teacher_graphdef, teacher = shapes(jnp.bfloat16)
optimizer = make_optimizer(OptimizerConfig(), ForesightConfig(track=TrackConfig(rank=4, every=2)))
opt_state = jax.tree.map(
    lambda s, place: give(s.shape, s.dtype, place),
    jax.eval_shape(optimizer.init, params), optimizer_shardings(optimizer, params))
B, width, N = 16, 128, 128
ints = lambda *shape: give(shape, jnp.int32, rows)
floats = lambda *shape: give(shape, jnp.float32, rows)
batch = Batch(ints(B, width), ints(B), ints(B, N), give((B, N), jnp.bool_, rows), floats(B, N), floats(B, N))
key = jax.eval_shape(jax.random.key, 0)

def compiled(name, function, *args, **kwargs):
    done = function.trace(*args, **kwargs).lower(lowering_platforms=("tpu",)).compile()
    print(json.dumps([name, collectives(done.as_text(), loops=N)]), flush=True)
    return done

def reused(done, arguments):
    header = done.as_text().partition("entry_computation_layout")[0]
    aliased = re.findall(r"\\(\\d+, \\{\\}, (?:may|must)-alias\\)", header)
    assert len(aliased) == len(jax.tree.leaves(arguments)) > 0

with compiling_for("tpu"), jax.set_mesh(mesh):
    hidden = give((B, N, config.width), jnp.bfloat16, rows)
    scored = compiled("score", make_score(teacher_graphdef, 2), teacher, batch)
    assert scored.output_shardings.spec == P("fsdp"), scored.output_shardings
    state = State(params, opt_state)
    update = make_update(
        graphdef, (teacher_graphdef,), optimizer, make_objective(Config()),
        dtype=jnp.bfloat16, micro_batches=2, loss_chunk=32,
        shardings=jax.tree.map(lambda a: a.sharding, state))
    done = compiled("update", update, state, (teacher,), batch, (hidden,))
    reused(done, state)
    row = give((B,), jnp.uint32, rows)
    stops = give((2,), jnp.int32, whole)
    static = dict(graphdef=graphdef, sampling=rollout.Sampling(top_p=0.9))
    sampler = (shapes(jnp.bfloat16)[1], ints(B, width), ints(B), key, row, stops)
    prefilled = compiled("prefill", _generate._prefill, *sampler, slots=N, **static)
    cache = prefilled.output_shardings.cache.k  # no whole copies
    assert cache.spec == P(None, None, "tensor", "fsdp"), cache
    state = jax.eval_shape(lambda *a: _generate._prefill(*a, slots=N, **static), *sampler)
    state = jax.tree.map(lambda s, place: give(s.shape, s.dtype, place), state, prefilled.output_shardings)
    done = compiled("decode", _generate._decode, sampler[0], state, *sampler[1:], N, **static)
    reused(done, state)
    # Nor is it copied into another layout on its way in or out.
    copied = re.findall(r"= bf16\\[([\\d,]+)\\]\\S* copy\\(", done.as_text())
    mine = sorted(cache.shard_shape(state.cache.k.shape))
    assert copied and mine not in [sorted(map(int, sizes.split(","))) for sizes in copied]
"""
_OFFLOAD = """
import jax, jax.numpy as jnp
from flax import nnx
from opd_jax import models, parallel

mesh = parallel.make_mesh(1, 4, 2, devices=parallel.topology("v5e:2x4"))
config = models.DecoderConfig(
    vocab_size=256, width=256, layers=8, heads=4, kv_heads=2, head_width=128, ff_width=512,
    qk_norm=True, architecture="Qwen3ForCausalLM")
tokens = jax.ShapeDtypeStruct((16, 2048), jnp.int32, sharding=parallel.batch_sharding(mesh))
with parallel.compiling_for("tpu"), jax.set_mesh(mesh):
    graphdef, params = nnx.split(models.abstract(config, jnp.bfloat16, remat="offload"))
    params = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s),
        params, parallel.param_shardings(params, mesh))
    loss = lambda p, t: jnp.square(nnx.merge(graphdef, p).hidden_states(t)[0].astype(jnp.float32)).sum()
    traced = jax.jit(jax.value_and_grad(loss)).trace(params, tokens)
    done = traced.lower(lowering_platforms=("tpu",)).compile()
print(done.memory_analysis().host_temp_size_in_bytes)
"""


VOCABULARY, WIDTH, DEVICES, MICRO_BATCHES = 6144, 256, 4, 2  # as above; devices of mesh.fsdp


def printed(program: str) -> list[str]:
    """Lines of its own process: libtpu takes a lock and reads the environment when it is loaded."""
    pytest.importorskip("libtpu")
    root = str(Path(opd_jax.__file__).parents[1])
    environment = os.environ | dict(
        PYTHONPATH=os.pathsep.join([root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        JAX_PLATFORMS="cpu",
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, env=environment, stdout=subprocess.PIPE
    )
    return done.stdout.decode().splitlines()


@pytest.fixture(scope="module")
def programs():
    """The collectives of each program by its name."""
    found = dict(map(json.loads, printed(_PROGRAM)))
    return {
        name: [Sent(kind, tuple(dims), *rest) for kind, dims, *rest in all] for name, all in found.items()
    }


def of_vocabulary(sent: Sent) -> bool:
    """Whether a dimension is that of the vocabulary, whole or a device's part (mesh.tensor is 2)."""
    return bool({VOCABULARY, VOCABULARY // 2} & {*sent.dims})


@pytest.mark.tpu
def test_every_program_of_a_run_compiles_for_a_tpu_slice(programs):
    """And the update reuses the memory of the whole state, decode that of the whole cache."""
    assert list(programs) == ["score", "update", "prefill", "decode"]
    assert all(programs.values())


@pytest.mark.tpu
def test_no_logits_are_gathered(programs):
    """What is gathered or summed with the vocabulary among its sizes is a model's matrix, never a token's
    logits. (To find the most likely tokens of a split vocabulary, devices exchange parts: an all-to-all.)"""
    for name in ("score", "update"):
        for sent in filter(of_vocabulary, programs[name]):
            if sent.kind != "all-to-all":
                others = [n for n in sent.dims if n not in (1, VOCABULARY, VOCABULARY // 2)]
                assert others in ([WIDTH], [WIDTH // DEVICES]), (name, sent)
                assert sent.kind != "collective-permute", (name, sent)


@pytest.mark.tpu
def test_unembeddings_are_gathered_once_for_a_micro_batch_and_not_for_each_of_its_chunks(programs):
    """A micro-batch has 8 chunks, in each direction. What it needs: the unembeddings of student and teacher,
    and the student's embedding, gathered once; the gradients of its two matrices summed once."""
    sent = [each for each in programs["update"] if of_vocabulary(each)]
    gathered = sum(each.times for each in sent if each.kind == "all-gather")
    summed = sum(each.times for each in sent if each.kind in ("all-reduce", "reduce-scatter"))
    assert 2 <= gathered <= 3 * MICRO_BATCHES, sent
    assert 2 <= summed <= 2 * MICRO_BATCHES, sent


@pytest.mark.tpu
def test_no_tracked_matrix_is_gathered(programs):
    """The forward pass gathers bfloat16 copies; the float32 matrices of the optimiser stay where they are."""
    for sent in programs["update"]:
        if sent.kind == "all-gather" and sent.width == 4:
            assert len([n for n in sent.dims if n >= WIDTH // 2]) < 2, sent


@pytest.mark.slow
@pytest.mark.tpu
def test_offloaded_inputs_of_layers_are_not_on_the_chip():
    """Their bytes, of 8 layers and 4 rows a device in bfloat16, are in the host's memory. (At twice the width
    the chip needs 114 MiB of temporaries, with `block` 186; compiling both takes a minute.)"""
    assert int(printed(_OFFLOAD)[0]) == 8 * 4 * 2048 * 256 * 2
