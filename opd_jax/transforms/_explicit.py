"""Layouts: mesh axes that are Explicit want one for each result, and on Auto ones XLA wants hints."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh with Explicit axes that the first leaf with one is typed with."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if AxisType.Explicit in mesh.axis_types:
                return mesh
    return None


def spec_of(leaf: Any) -> tuple:
    """For each axis of an array the mesh axes that its type names; none but on a mesh with Explicit axes."""
    if explicit_mesh(leaf) is None:
        return (None,) * len(leaf.shape)
    return tuple(jax.typeof(leaf).sharding.spec)


def fitted(names: Any, size: int, mesh: AbstractMesh | Mesh | None) -> Any:
    """The mesh axes if they divide the size, else None."""
    if names is None or mesh is None:
        return None
    split = 1
    for name in (names,) if isinstance(names, str) else names:
        split *= mesh.shape[name]
    return names if size % split == 0 else None


def auto(function: Callable, specs: Any, *args: Any) -> Any:
    """`function(*args)`; on a mesh with Explicit axes the compiler lays out all but the results.

    Args:
        function: of arrays, to a tree of arrays; traceable.
        specs: a tree like its result, of tuples as from `spec_of` wrapped in `PartitionSpec`.
        args: trees of arrays; the mesh is theirs.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return function(*args)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    return jax.sharding.auto_axes(function, out_sharding=shardings)(*args)


def laid_out(x: jax.Array, spec: PartitionSpec, mesh: AbstractMesh | None) -> jax.Array:
    """A new array with that sharding in its type, if there is a mesh with Explicit axes."""
    return x if mesh is None else jax.sharding.reshard(x, NamedSharding(mesh, spec))


def whole(x: jax.Array, *axes: int) -> jax.Array:
    """Where the compiler lays out x on a mesh: with these axes on every device, the others as it likes."""
    mesh = jax.typeof(x).sharding.mesh
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    spec = [None if a in axes else PartitionSpec.UNCONSTRAINED for a in range(x.ndim)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
