"""Which mesh axes each logical axis of a parameter is split over."""

import math
from dataclasses import dataclass, fields
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Mesh axes of each logical axis; None: not split.

    Raises:
        ValueError: from `spec`, if two axes of one array would be split over the same mesh axis.
    """

    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    norm: MeshAxes = None

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
        """The partition of an array whose last dimensions have the logical names `axes`.

        A dimension that its mesh axes do not divide stays whole, as do leading dimensions
        without a name (stacked layers).
        """
        known = [f.name for f in fields(self)]
        if unknown := [a for a in axes if a is not None and a not in known]:
            raise ValueError(f"unknown logical axis {unknown[0]!r}; known: {', '.join(known)}")
        if len(axes) > len(shape):
            raise ValueError(f"logical axes {axes} do not fit an array of shape {shape}")
        names: list[MeshAxes] = [None] * (len(shape) - len(axes))
        names += [None if a is None else getattr(self, a) for a in axes]
        used: dict[str, int] = {}
        for dimension, name in enumerate(names):
            for axis in (name,) if isinstance(name, str) else name or ():
                if axis not in mesh.shape:
                    raise ValueError(f"the mesh has axes {tuple(mesh.shape)}, not {axis!r}")
                if axis in used:
                    raise ValueError(
                        f"logical axes {axes}: dimensions {used[axis]} and {dimension} would both"
                        f" be split over mesh axis {axis!r}"
                    )
                used[axis] = dimension
        fitted = [
            name if size % _size(mesh, name) == 0 else None for size, name in zip(shape, names, strict=True)
        ]
        return P(*fitted)


def _size(mesh: Mesh, name: MeshAxes) -> int:
    return math.prod(mesh.shape[a] for a in ((name,) if isinstance(name, str) else name or ()))


def param_shardings(params: Any, mesh: Mesh, rules: ShardingRules | None = None) -> Any:
    """Shardings of parameters, in a tree of the same structure.

    Args:
        params: an nnx State or Module of variables, real or abstract, each with the logical names
            of its last dimensions in the metadata `axes`, as `opd_jax.models.Decoder` has; a
            variable or an array without them is replicated.
        mesh: from `make_mesh`.
        rules: default: `ShardingRules()`.

    Returns:
        `params` with a `NamedSharding` in place of each array, fit for `jax.device_put` and the
        `in_shardings` of `jax.jit`.
    """
    rules = rules or ShardingRules()

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, P())
        axes = leaf.get_metadata().get("axes", ())
        return leaf.replace(NamedSharding(mesh, rules.spec(axes, leaf.shape, mesh)))

    return jax.tree.map(one, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
