"""Compiles the transforms for a TPU topology and prints what the optimised program contains, as JSON.

    python tests/transforms/tpu_transforms.py                    # the update with all of them
    python tests/transforms/tpu_transforms.py "adamw, track"     # another chain of the names in FACTORIES

The shapes are those of SmolLM2-135M (30 stacked layers) on 16 chips. It runs in a process of its own: libtpu
locks, and must not load where other tests run.
"""

import json
import math
import os
import re
import sys
import time

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import transforms

LAYERS, WIDTH, FF, KV, VOCABULARY = 30, 576, 1536, 192, 49152
COLUMN, ROW = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")
SHAPES = {
    "embedding": ((VOCABULARY, WIDTH), P("tensor", "fsdp")),
    "layers": {
        "attention": {
            "q": {"kernel": ((LAYERS, WIDTH, WIDTH), COLUMN)},
            "k": {"kernel": ((LAYERS, WIDTH, KV), COLUMN)},
            "v": {"kernel": ((LAYERS, WIDTH, KV), COLUMN)},
            "o": {"kernel": ((LAYERS, WIDTH, WIDTH), ROW)},
        },
        "attention_norm": {"scale": ((LAYERS, WIDTH), P())},
        "mlp": {
            "gate": {"kernel": ((LAYERS, WIDTH, FF), COLUMN)},
            "up": {"kernel": ((LAYERS, WIDTH, FF), COLUMN)},
            "down": {"kernel": ((LAYERS, FF, WIDTH), ROW)},
        },
        "mlp_norm": {"scale": ((LAYERS, WIDTH), P())},
    },
    "norm": {"scale": ((WIDTH,), P())},
}


def score(params):
    return -sum(jnp.mean(jnp.square(x)) for x in jax.tree.leaves(params))


FACTORIES = {
    "adamw": lambda: optax.adamw(1e-3),
    "track": lambda: transforms.track_subspace(rank=16, every=10),
    "displacement": lambda: transforms.track_subspace(rank=16, every=10, of="displacement"),
    "lanczos": lambda: transforms.track_subspace(rank=16, every=10, lanczos=(4, 8)),
    "allocate": lambda: transforms.allocate_modules(10, "scale"),
    "project": lambda: transforms.project_to_subspace(optax.scale_by_adam(), rank=16),
    "extrapolate": lambda: transforms.extrapolate(score),
}
COLLECTIVE = r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


SIDES = {side // split for side in (WIDTH, FF, KV, VOCABULARY) for split in (1, 4)}


def shapes(text):
    return [[int(d) for d in dims.split(",")] for dims in re.findall(r"\w\[(\d[\d,]*)\]", text)]


def collectives(text):
    """Of each kind the largest array that one makes, and the largest with two sides of a weight or shard."""
    found = {}
    for result, kind in re.findall(COLLECTIVE, text):
        largest, matrix = found.get(kind, (0, 0))
        for shape in shapes(result):
            size = math.prod(shape)
            largest = max(largest, size)
            matrix = max(matrix, size * (sum(side in SIDES for side in shape) >= 2))
        found[kind] = (largest, matrix)
    return {kind: dict(largest=n, matrix=m) for kind, (n, m) in found.items()}


def compiled(optimizer, mesh):
    def struct(entry):
        return jax.ShapeDtypeStruct(entry[0], jnp.float32, sharding=NamedSharding(mesh, entry[1]))

    params = jax.tree.map(struct, SHAPES, is_leaf=lambda x: type(x) is tuple)
    state = jax.eval_shape(optimizer.init, params)

    def of_param(leaf, param):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=fitted(leaf, param))

    def fitted(leaf, param):
        return param.sharding if len(leaf.shape) == len(param.sharding.spec) else NamedSharding(mesh, P())

    def other(part):
        whole = NamedSharding(mesh, P())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), part)

    state = optax.tree.map_params(optimizer, of_param, state, params, transform_non_params=other)

    def step(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(
        step,
        donate_argnums=(1, 2),
        out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)),
    )
    return step.trace(params, state, params).lower(lowering_platforms=("tpu",)).compile()


def main():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = Mesh(np.array(topology.devices).reshape(4, 4), ("fsdp", "tensor"))
    assert mesh.devices.flat[0].platform == "tpu"
    for chain in sys.argv[1:] or ["project, displacement, allocate, extrapolate"]:
        optimizer = optax.chain(*(FACTORIES[name.strip()]() for name in chain.split(",")))
        start, cpu = time.perf_counter(), time.process_time()
        program = compiled(optimizer, mesh)
        text, seconds = program.as_text(), time.perf_counter() - start
        report = dict(
            chain=chain,
            seconds=round(seconds, 1),
            cpu_seconds=round(time.process_time() - cpu, 1),
            custom_calls=sorted(set(re.findall(r'custom_call_target="([^"]+)"', text))),
            collectives=collectives(text),
            temp_bytes=program.memory_analysis().temp_size_in_bytes,
            code_bytes=program.memory_analysis().generated_code_size_in_bytes,
        )
        print(json.dumps(report), flush=True)


main()
