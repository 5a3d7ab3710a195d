"""What a run keeps on each device."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax.parallel import ROWS
from opd_jax.training._setup import Setup
from opd_jax.training._step import State


def shard_bytes(leaf: Any) -> int:
    """Bytes of an array, or of a shape with a sharding, on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def bytes_per_device(tree: Any) -> int:
    """Bytes of the arrays of a tree on the device that has most of them."""
    return sum(
        shard_bytes(leaf)
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array) and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def memory_table(setup: Setup, state: State) -> str:
    """What stays on each device between programs, and the sampler's cache; a program's temporaries are not
    in it, see `opd-jax plan`."""
    config = setup.config
    parts = {
        "student": (state.params, setup.frozen),
        "optimizer": state.opt_state,
        "moving average": state.ema,
        "anchor": state.anchor,
        "teachers and reference": setup.scorer.models,
    }
    sizes = {name: bytes_per_device(part) for name, part in parts.items()}
    if str(config.student.dtype) != "float32" and setup.frozen is None:
        sizes["student's copy for sampling"] = sizes["student"] // 4 * np.dtype(config.student.dtype).itemsize
    sizes["KV cache"] = _cache_bytes(setup, state)
    table, apart = _table(setup.mesh, sizes, "devices"), setup.scorer.apart
    if apart is None:
        return table
    there = _table(apart.mesh, {"teacher": bytes_per_device(apart.params)}, "devices of the teacher")
    return f"{table}\n{there}"


def _table(mesh: Mesh, sizes: dict[str, int], what: str) -> str:
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    lines = [f"on each of {mesh.size} {what} ({axes}), in MB:"]
    lines += [f"  {name:28}{size / 1e6:12.1f}" for name, size in sizes.items() if size]
    return "\n".join([*lines, f"  {'together':28}{sum(sizes.values()) / 1e6:12.1f}"])


def _cache_bytes(setup: Setup, state: State) -> int:
    config = setup.config
    slots = setup.prompts.bucket + config.max_new_tokens
    count = config.rollout_batch or config.batch_size
    cache = jax.eval_shape(lambda params: setup.model(params).init_cache(count, slots), state.params)
    total = 0
    for array in (cache.k, cache.v):
        rows, heads = (
            axes if size % math.prod(setup.mesh.shape[a] for a in axes) == 0 else None
            for axes, size in ((ROWS, array.shape[1]), (("tensor",), array.shape[3]))
        )
        placed = NamedSharding(setup.mesh, P(None, rows, None, heads))
        total += shard_bytes(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placed))
    return total
