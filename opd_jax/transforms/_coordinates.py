"""Coordinates of matrices in subspaces of their rows, columns or both; see `project_to_subspace`."""

import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from opd_jax.transforms._explicit import auto, explicit_mesh, fitted, laid_out, spec_of
from opd_jax.transforms._matrices import Matrices, Matrix, from_stack, path_name, select, to_stack
from opd_jax.transforms.spectrum import cholesky_qr2, init_basis, subspace_step

_HIGHEST = jax.lax.Precision.HIGHEST  # on TPU float32 products would else be of bfloat16


class Part(NamedTuple):
    """One projected leaf.

    Attributes:
        matrix: the leaf's.
        rank: k.
        left: whether rows are projected.
        right: whether columns are.
        small: the matrix of its coordinates.
        shape: of its coordinates, with as many axes as the leaf.
    """

    matrix: Matrix
    rank: int
    left: bool
    right: bool
    small: Matrix
    shape: tuple[int, ...]


class Moment(NamedTuple):
    """A leaf of the inner optimiser's state that has the shape of some coordinates.

    Attributes:
        place: among the leaves of that state.
        part: among the parts.
        squares: whether it is a mean of squares.
    """

    place: int
    part: int
    squares: bool


def parts(tree: Any, matrices: Matrices, rank: int, sides: str, on_small: str | None) -> tuple[Part, ...]:
    """How each selected leaf is projected; `on_small` None says nothing of matrices that are too small."""
    leaves = jax.tree.leaves(tree)
    who, small, out = "project_to_subspace", [], []
    for matrix in select(tree, matrices, who):
        _, m, n = matrix.shape
        k = min(rank, m, n)
        if k < rank:
            small.append(f"{matrix.name} ({m} x {n})")
        left = sides in ("left", "both") or (sides == "auto" and m >= n)
        right = sides in ("right", "both") or (sides == "auto" and m < n)
        shape = list(jnp.shape(leaves[matrix.index]))
        for axes in (matrix.axes.rows,) * left + (matrix.axes.columns,) * right:
            for i, axis in enumerate(axes):
                shape[axis] = 1 if i else k
        sizes = (matrix.shape[0], k if left else m, k if right else n)
        out.append(Part(matrix, k, left, right, matrix._replace(shape=sizes), tuple(shape)))
    if small and on_small is not None:
        message = f"{who}: rank {rank} is more than some matrices have: {', '.join(small)}"
        if on_small == "error":
            raise ValueError(message)
        warnings.warn(f"{message}; they take what they have", stacklevel=4)
    return tuple(out)


def check_bases(found: Sequence[Part], left: Any, right: Any) -> None:
    """That bases are those of these parts."""
    for side, bases in ("left", left), ("right", right):
        axis = 1 if side == "left" else 2
        wanted = [(p.matrix.shape[0], p.matrix.shape[axis], p.rank) for p in found if getattr(p, side)]
        shapes = [jnp.shape(x) for x in jax.tree.leaves(bases)]
        if shapes != wanted:
            raise ValueError(
                f"project_to_subspace: the state is that of other parameters or other `matrices`: its {side} "
                f"bases are {shapes}, but selected are "
                + ", ".join(f"{p.matrix.name} {p.matrix.shape}" for p in found)
            )


def first_bases(found: Sequence[Part], leaves: Sequence[Any]) -> tuple[tuple, tuple]:
    """Random bases, the same for all layers of a stack, laid out as the axis of the leaf that they span."""
    mesh = explicit_mesh(leaves)
    bases = ([], [])
    for part in found:
        for side, wanted in enumerate((part.left, part.right)):
            if not wanted:
                continue
            size = part.matrix.shape[1 + side]
            basis = init_basis(size, part.rank, 2 * part.matrix.index + side)
            basis = jnp.tile(basis, (part.matrix.shape[0], 1, 1))
            axes = (part.matrix.axes.rows, part.matrix.axes.columns)[side]
            specs = [spec_of(leaves[part.matrix.index])[a] for a in axes]
            names = fitted(specs[0], size, mesh) if not any(specs[1:]) else None
            bases[side].append(laid_out(basis, P(None, names, None), mesh))
    return tuple(bases[0]), tuple(bases[1])


def zeros(part: Part, leaf: Any) -> jax.Array:
    """Coordinates for `init`."""
    mesh = explicit_mesh(leaf)
    return laid_out(jnp.zeros(part.shape, jnp.float32), _spec(part, leaf, mesh), mesh)


def _spec(part: Part, leaf: Any, mesh: AbstractMesh | None) -> P:
    """Coordinates lie as the leaf does, but for projected axes that the mesh does not divide."""
    return P(*(fitted(s, n, mesh) for s, n in zip(spec_of(leaf), part.shape, strict=True)))


def _with_bases(found: Sequence[Part], left: Any, right: Any) -> Iterator[tuple[Part, Any, Any]]:
    left, right = iter(left), iter(right)
    for part in found:
        yield part, next(left) if part.left else None, next(right) if part.right else None


def project(found: Sequence[Part], arrays: Sequence[jax.Array], left: Any, right: Any) -> list[jax.Array]:
    """Coordinates of each, float32."""

    def run(arrays, left, right):
        out = []
        for x, (part, u, v) in zip(arrays, _with_bases(found, left, right), strict=True):
            x = to_stack(x.astype(jnp.float32), part.matrix)
            if u is not None:
                x = jnp.einsum("smk,smn->skn", u, x, precision=_HIGHEST)
            if v is not None:
                x = jnp.einsum("smn,snk->smk", x, v, precision=_HIGHEST)
            out.append(from_stack(x, part.small, part.shape))
        return out

    mesh = explicit_mesh(arrays)
    specs = [_spec(part, x, mesh) for part, x in zip(found, arrays, strict=True)]
    return auto(run, specs, arrays, left, right)


def lift(
    found: Sequence[Part], small: Sequence[jax.Array], left: Any, right: Any, like: Sequence[jax.Array]
) -> list[jax.Array]:
    """The arrays with these coordinates and nothing outside of the subspace, float32, laid out as `like`."""
    shapes = [x.shape for x in like]

    def run(small, left, right):
        out = []
        for x, shape, (part, u, v) in zip(small, shapes, _with_bases(found, left, right), strict=True):
            x = to_stack(x.astype(jnp.float32), part.small)
            if v is not None:
                x = jnp.einsum("smk,snk->smn", x, v, precision=_HIGHEST)
            if u is not None:
                x = jnp.einsum("smk,skn->smn", u, x, precision=_HIGHEST)
            out.append(from_stack(x, part.matrix, shape))
        return out

    return auto(run, [P(*spec_of(x)) for x in like], small, left, right)


def energies(
    found: Sequence[Part], small: Sequence[jax.Array], arrays: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Of each matrix the share of its squared norm that its coordinates have, [stack] float32; 0 of 0."""

    def run(small, arrays):
        out = []
        for part, c, x in zip(found, small, arrays, strict=True):
            axes = part.matrix.axes.rows + part.matrix.axes.columns
            inside, whole = (jnp.square(y.astype(jnp.float32)).sum(axes).reshape(-1) for y in (c, x))
            out.append(jnp.where(whole > 0, inside / jnp.where(whole > 0, whole, 1.0), 0.0))
        return tuple(out)

    return auto(run, tuple(P() for _ in found), small, arrays)


def moments(
    inner_state: Any, names: Sequence[str], found: Sequence[Part], second: Sequence[str]
) -> list[Moment]:
    """The leaves of the inner state that are moments of projected leaves, by path and shape.

    Args:
        inner_state: the inner optimiser's.
        names: dotted, of all leaves of the parameters.
        found: the parts.
        second: fields that hold means of squares.
    """
    by_index = {part.matrix.index: i for i, part in enumerate(found)}
    longest = sorted(range(len(names)), key=lambda i: -len(names[i]))
    out = []
    for place, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(inner_state)):
        words = path_name(path)
        # Another parameter's name may be the end of this one's: the longest that fits is meant.
        index = next((i for i in longest if f".{words}".endswith(f".{names[i]}".rstrip("."))), None)
        part = by_index.get(index)
        if part is not None and jnp.shape(leaf) == found[part].shape:
            field = words.removesuffix(names[index]).rstrip(".").rsplit(".", 1)[-1]
            out.append(Moment(place, part, field in second))
    return out


def refresh(
    found: Sequence[Part],
    arrays: Sequence[jax.Array],
    left: Any,
    right: Any,
    values: Sequence[jax.Array],
    which: Sequence[Moment],
    times: jax.Array,
) -> tuple[tuple, tuple, list[jax.Array], jax.Array]:
    """Bases that follow the arrays, moments in their coordinates, and the mean overlap of new and old.

    Args:
        found: the parts.
        arrays: what the bases follow, one for each part.
        left: bases.
        right: bases.
        values: of the moments.
        which: the moments.
        times: iterations, [] int32.
    """
    groups = _groups(found, arrays)

    def run(arrays, left, right, values, times):
        new = _followed(found, groups, arrays, left, right, times)
        bases, turns, overlaps = ([], []), ([], []), []
        for side, old in enumerate((left, right)):
            for u, v in zip(new[side], old, strict=True):
                u, turn = _facing(u, v)
                bases[side].append(u)
                turns[side].append(turn)
                overlaps.append(jnp.square(turn).sum((1, 2)) / turn.shape[-1])
        by_part = list(_with_bases(found, *turns))
        moved = [_moved(x, moment, *by_part[moment.part]) for x, moment in zip(values, which, strict=True)]
        return tuple(bases[0]), tuple(bases[1]), moved, jnp.concatenate(overlaps).mean()

    specs = jax.tree.map(lambda x: P(*spec_of(x)), (left, right, list(values)))
    return auto(run, (*specs, P()), arrays, left, right, values, times)


def _groups(found: Sequence[Part], arrays: Sequence[jax.Array]) -> list[list[int]]:
    """Parts with one role in different layers, laid out alike: they are iterated as one stack."""
    groups: dict[tuple, list[int]] = {}
    for i, (part, x) in enumerate(zip(found, arrays, strict=True)):
        role = re.sub(r"\d+", "#", part.matrix.name)
        key = (role, part.matrix.shape[1:], part.matrix.axes, spec_of(x))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _followed(
    found: Sequence[Part], groups: list, arrays: Sequence, left: Any, right: Any, times: jax.Array
) -> tuple[tuple, tuple]:
    """New left and right bases."""
    bases = list(_with_bases(found, left, right))
    new: list[tuple] = [()] * len(found)
    for group in groups:
        x = jnp.concatenate([to_stack(arrays[i], found[i].matrix) for i in group])
        u, v = (
            None if bases[group[0]][side] is None else jnp.concatenate([bases[i][side] for i in group])
            for side in (1, 2)
        )
        start = 0
        u, v = _iterated(x, u, v, times)
        for i in group:
            end = start + found[i].matrix.shape[0]
            new[i] = tuple(None if y is None else y[start:end] for y in (u, v))
            start = end
    return tuple(tuple(pair[side] for pair in new if pair[side] is not None) for side in (0, 1))


def _iterated(x: jax.Array, u: Any, v: Any, times: jax.Array) -> tuple[Any, Any]:
    if u is not None and v is not None:

        def both(_, bases):
            found = subspace_step(x, bases[1])
            return found.left, found.right

        return jax.lax.fori_loop(0, times, both, (u, v))
    if u is not None:
        x = x.swapaxes(1, 2)
    basis = jax.lax.fori_loop(0, times, lambda _, b: subspace_step(x, b).right, v if u is None else u)
    return (None, basis) if u is None else (basis, None)


def _facing(new: jax.Array, old: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Another basis of what `new` spans, turned towards `old`, and R = U_new^T U_old, [stack, k, k].

    Where the subspace stays, so do its coordinates. Singular vectors themselves would turn and change signs
    with every gradient, and squares lose what was known of them; and on both sides they would make the
    coordinates diagonal: rounding errors beside the diagonal, which Adam scales to 1.
    """
    turn = jnp.einsum("smi,smj->sij", new, old, precision=_HIGHEST)
    within = cholesky_qr2(turn)
    new = jnp.einsum("smi,sij->smj", new, within, precision=_HIGHEST)
    return new, jnp.einsum("sij,sik->sjk", within, turn, precision=_HIGHEST)


def _moved(x: jax.Array, moment: Moment, part: Part, left: Any, right: Any) -> jax.Array:
    """A moment in the coordinates of the new bases, from R = U_new^T U_old of each side, [stack, k, k]."""
    stack = to_stack(x.astype(jnp.float32), part.small)
    if left is not None:
        stack = _turned(stack, left, moment.squares)
    if right is not None:
        stack = _turned(stack.swapaxes(1, 2), right, moment.squares).swapaxes(1, 2)
    return from_stack(stack, part.small, part.shape).astype(x.dtype)


def _turned(x: jax.Array, turn: jax.Array, squares: bool) -> jax.Array:
    """R x [stack, k, n] for means; for means of squares R**2 x, and of x's mean what R**2 leaves out."""
    if not squares:
        return jnp.einsum("sij,sjn->sin", turn, x, precision=_HIGHEST)
    weights = jnp.square(turn)
    rest = jnp.maximum(1.0 - weights.sum(2, keepdims=True), 0.0)
    return jnp.einsum("sij,sjn->sin", weights, x, precision=_HIGHEST) + rest * x.mean(1, keepdims=True)
