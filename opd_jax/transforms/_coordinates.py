"""Coordinates of matrices in subspaces of their rows, columns or both; see `project_to_subspace`."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax.transforms._blocks import orthonormal
from opd_jax.transforms._explicit import auto, explicit_mesh, fitted, laid_out, spec_of, whole
from opd_jax.transforms._matrices import Matrices, Matrix, from_stack, path_name, select, to_stack
from opd_jax.transforms.spectrum import init_basis

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
    """Coordinates for `init`, laid out as the leaf is, where that is known."""
    mesh = explicit_mesh(leaf)
    if mesh is None and isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        placed = leaf.sharding
        if isinstance(placed, NamedSharding):
            names = [*placed.spec, *[None] * (leaf.ndim - len(placed.spec))]
            spec = P(*(fitted(a, n, placed.mesh) for a, n in zip(names, part.shape, strict=True)))
            return jnp.zeros(part.shape, jnp.float32, device=NamedSharding(placed.mesh, spec))
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
            # With k spread over a mesh axis that m is spread over, too, XLA might gather x.
            if u is not None:
                x = whole(jnp.einsum("smk,smn->skn", u, x, precision=_HIGHEST), 1)
            if v is not None:
                x = whole(jnp.einsum("smn,snk->smk", x, v, precision=_HIGHEST), 2)
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
            x = whole(x, *[1] * part.left, *[2] * part.right)  # else sums over k might be of the whole matrix
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
    ends, explicit = len(left), explicit_mesh(arrays) is not None

    def run(arrays, left, right, values, times):
        new_left, new_right = _followed(found, arrays, left, right, times)
        bases, turns = _facing([*new_left, *new_right], [*left, *right])
        by_part = list(_with_bases(found, turns[:ends], turns[ends:]))
        moved = [_moved(x, moment, *by_part[moment.part]) for x, moment in zip(values, which, strict=True)]
        overlaps = [jnp.square(turn).sum((1, 2)) / turn.shape[-1] for turn in turns]
        if not explicit:
            bases = [whole(b, 1, 2) for b in bases]
        return tuple(bases[:ends]), tuple(bases[ends:]), moved, jnp.concatenate(overlaps).mean()

    specs = jax.tree.map(lambda x: P(*spec_of(x)), (left, right, list(values)))
    return auto(run, (*specs, P()), arrays, left, right, values, times)


def _followed(
    found: Sequence[Part], arrays: Sequence[jax.Array], left: Any, right: Any, times: jax.Array
) -> tuple[list, list]:
    """Block iteration as in `spectrum.subspace_step`, but unrotated: of the new bases only spans matter."""
    xs = [to_stack(x.astype(jnp.float32), part.matrix) for x, part in zip(arrays, found, strict=True)]

    def across(forward: list[bool], bases: list) -> list:
        # Bases of one shape are factorised together, and get one layout; one x does not fit might gather x.
        bases = [whole(b, 1, 2) for b in bases]
        ways = ["smn,snk->smk" if onto_rows else "smn,smk->snk" for onto_rows in forward]
        return orthonormal(
            [jnp.einsum(way, x, b, precision=_HIGHEST) for way, x, b in zip(ways, xs, bases, strict=True)]
        )

    def step(_, bases):
        starts = [u if v is None else v for _, u, v in _with_bases(found, *bases)]
        middle = across([part.right for part in found], starts)
        end = across([not part.right for part in found], middle)
        both = zip(found, middle, end, strict=True)
        return (
            [m if part.right else e for part, m, e in both if part.left],
            [e for part, e in zip(found, end, strict=True) if part.right],
        )

    return jax.lax.fori_loop(0, times, step, (list(left), list(right)))


def _facing(new: list, old: list) -> tuple[list, list]:
    """Other bases of what `new` span, turned towards `old`, and R = U_new^T U_old of each, [stack, k, k].

    Where the subspace stays, so do its coordinates. Singular vectors themselves would turn and change signs
    with every gradient, and squares lose what was known of them; and on both sides they would make the
    coordinates diagonal: rounding errors beside the diagonal, which Adam scales to 1.
    """
    turns = [jnp.einsum("smi,smj->sij", u, v, precision=_HIGHEST) for u, v in zip(new, old, strict=True)]
    within = orthonormal(turns)
    new = [jnp.einsum("smi,sij->smj", u, r, precision=_HIGHEST) for u, r in zip(new, within, strict=True)]
    return new, [
        jnp.einsum("sij,sik->sjk", r, turn, precision=_HIGHEST) for r, turn in zip(within, turns, strict=True)
    ]


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
