"""Compiles the fused losses for a TPU topology and prints what the optimised programs contain, as JSON.

Run in its own process by test_fused.py: libtpu locks, and must not load where other tests run.
"""

import json
import os
import re

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import losses

TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY, CHUNK = 2048, 256, 128, 32768, 256


def fused(*args):
    def mean(hidden, kernel):
        return losses.fused(losses.reverse_kl, hidden, kernel, *args[2:4], chunk=CHUNK) @ args[4]

    return jax.value_and_grad(mean, argnums=(0, 1))(*args[:2])


def fused_sum(*args):
    def total(hidden, kernel):
        return losses.fused_sum(losses.jsd, args[4], hidden, kernel, *args[2:4], chunk=CHUNK)[0]

    return jax.value_and_grad(total, argnums=(0, 1))(*args[:2])


def forward(*args):
    return losses.fused(losses.reverse_kl, *args[:4], chunk=CHUNK) @ args[4]


def dense(*args):
    def mean(hidden, kernel):
        logits = (hidden @ kernel, args[2] @ args[3])
        return losses.reverse_kl(*map(jax.nn.log_softmax, logits)) @ args[4]

    return jax.value_and_grad(mean, argnums=(0, 1))(*args[:2])


COLLECTIVE = r"= (.*?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"


def elements(text):
    return [int(np.prod([int(d) for d in dims.split(",")])) for dims in re.findall(r"\w\[(\d[\d,]*)\]", text)]


def sizes(text):
    """Elements of every array in the program, and of those that a collective makes."""
    made = [n for line in re.findall(COLLECTIVE, text) for n in elements(line)]
    return elements(text), made


def main():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    report = {"chunk_elements": CHUNK * VOCABULARY}
    for name, program, shards, dtype in (
        ("fused", fused, 1, jnp.bfloat16),
        ("fused_sum", fused_sum, 1, jnp.float32),
        ("dense", dense, 1, jnp.bfloat16),
        ("fused, vocabulary sharded", fused, 4, jnp.bfloat16),
        ("fused forward, vocabulary sharded", forward, 4, jnp.bfloat16),
    ):
        devices = np.array(topology.devices).reshape(-1)[:shards]
        mesh = Mesh(devices.reshape(1, shards), ("data", "tensor"))
        assert devices[0].platform == "tpu"

        def array(shape, *spec, dtype=dtype, mesh=mesh):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

        args = (
            array((TOKENS, WIDTH)),
            array((WIDTH, VOCABULARY), None, "tensor"),
            array((TOKENS, TEACHER_WIDTH)),
            array((TEACHER_WIDTH, VOCABULARY), None, "tensor"),
            array((TOKENS,), dtype=jnp.float32),
        )
        compiled = jax.jit(program).trace(*args).lower(lowering_platforms=("tpu",)).compile()
        every, collective = sizes(compiled.as_text())
        report[name] = {"largest": max(every), "largest_collective": max(collective, default=0)}
        report[name]["temp"] = compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps(report))


main()
