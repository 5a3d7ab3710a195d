"""The programs of a run, compiled ahead of time for a TPU topology; nothing runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import opd_jax

_PROGRAM = """
import re
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from opd_jax import models, rollout
from opd_jax.config import Config, OptimizerConfig
from opd_jax.parallel import batch_sharding, compiling_for, param_shardings
from opd_jax.rollout import _generate
from opd_jax.training._memory import shard_bytes
from opd_jax.training._objectives import make_objective
from opd_jax.training._optimizer import make_optimizer
from opd_jax.training._step import Batch, State, make_score, make_update

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
axes = ("data", "fsdp", "tensor")
mesh = Mesh(np.array(devices).reshape(1, 4, 2), axes, axis_types=(AxisType.Auto,) * 3)
assert mesh.devices.flat[0].platform == "tpu"
config = models.DecoderConfig(
    vocab_size=4096, width=256, layers=3, heads=8, kv_heads=4, head_width=128, ff_width=512,
    qk_norm=True, architecture="Qwen3ForCausalLM")
rows, whole = batch_sharding(mesh), NamedSharding(mesh, P())
give = lambda shape, dtype, sharding: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

def shapes(dtype, remat="block"):
    graphdef, params = nnx.split(models.abstract(config, dtype, remat=remat))
    place = param_shardings(params, mesh)
    return graphdef, jax.tree.map(lambda p, s: give(p.shape, p.dtype, s), params, place)

graphdef, params = shapes(jnp.float32)
teacher_graphdef, teacher = shapes(jnp.bfloat16)
optimizer = make_optimizer(OptimizerConfig())
opt_state = jax.tree.map(
    lambda s: give(s.shape, s.dtype, whole), jax.eval_shape(optimizer.init, params))
opt_state = optax.tree.map_params(optimizer, lambda _, p: p, opt_state, params)
B, width, N = 16, 128, 128
ints = lambda *shape: give(shape, jnp.int32, rows)
floats = lambda *shape: give(shape, jnp.float32, rows)
batch = Batch(ints(B, width), ints(B), ints(B, N), give((B, N), jnp.bool_, rows), floats(B, N), floats(B, N))
key = jax.eval_shape(jax.random.key, 0)

def compiled(name, function, *args, **kwargs):
    done = function.trace(*args, **kwargs).lower(lowering_platforms=("tpu",)).compile()
    print(name, done.memory_analysis().temp_size_in_bytes, flush=True)
    return done

def reused(done, arguments):
    least = sum(map(shard_bytes, jax.tree.leaves(arguments)))
    assert done.memory_analysis().alias_size_in_bytes >= least > 0

with jax.set_mesh(mesh):
    hidden = give((B, N, config.width), jnp.bfloat16, rows)
    scored = compiled("score", make_score(teacher_graphdef, 2), teacher, batch)
    assert scored.output_shardings.spec == P("fsdp"), scored.output_shardings
    update = make_update(
        graphdef, (teacher_graphdef,), optimizer, make_objective(Config()),
        dtype=jnp.bfloat16, micro_batches=2, loss_chunk=128)
    state = State(params, opt_state)
    done = compiled("update", update, state, (teacher,), batch, (hidden,))
    reused(done, state)
    row = give((B,), jnp.uint32, rows)
    stops = give((2,), jnp.int32, whole)
    static = dict(graphdef=graphdef, sampling=rollout.Sampling(top_p=0.9))
    sampler = (shapes(jnp.bfloat16)[1], ints(B, width), ints(B), key, row, stops)
with compiling_for("tpu"), jax.set_mesh(mesh):
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
    vocab_size=4096, width=512, layers=8, heads=8, kv_heads=4, head_width=64, ff_width=1024,
    qk_norm=True, architecture="Qwen3ForCausalLM")
tokens = jax.ShapeDtypeStruct((16, 2048), jnp.int32, sharding=parallel.batch_sharding(mesh))
for remat in ("block", "offload"):
    with parallel.compiling_for("tpu"), jax.set_mesh(mesh):
        graphdef, params = nnx.split(models.abstract(config, jnp.bfloat16, remat=remat))
        params = jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s),
            params, parallel.param_shardings(params, mesh))
        loss = lambda p, t: jnp.square(nnx.merge(graphdef, p).hidden_states(t)[0].astype(jnp.float32)).sum()
        traced = jax.jit(jax.value_and_grad(loss)).trace(params, tokens)
        done = traced.lower(lowering_platforms=("tpu",)).compile()
    memory = done.memory_analysis()
    print(memory.temp_size_in_bytes, memory.host_temp_size_in_bytes)
"""


def printed(program: str) -> list[str]:
    """Words of its own process: libtpu takes a lock and reads the environment when it is loaded."""
    pytest.importorskip("libtpu")
    root = str(Path(opd_jax.__file__).parents[1])
    environment = os.environ | dict(
        PYTHONPATH=os.pathsep.join([root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, env=environment, stdout=subprocess.PIPE
    )
    return done.stdout.decode().split()


@pytest.mark.tpu
def test_every_program_of_a_run_compiles_for_a_tpu_slice():
    """And the update reuses the memory of the whole state, decode that of the whole cache."""
    assert printed(_PROGRAM)[::2] == ["score", "update", "prefill", "decode"]


@pytest.mark.slow
@pytest.mark.tpu
def test_offloaded_inputs_of_layers_are_not_on_the_chip():
    temporaries, there, fewer, moved = map(int, printed(_OFFLOAD))
    inputs = 8 * 4 * 2048 * 512 * 2  # of 8 layers, 4 rows a device, bfloat16
    assert (there, moved) == (0, inputs) and fewer < temporaries - 0.8 * inputs
