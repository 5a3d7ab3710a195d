"""Which leaves of a parameter tree are matrices, and how their axes make rows, columns and a stack."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class MatrixAxes:
    """How the axes of an array make a stack of matrices; the axes named by neither are the stack.

    A kernel [in, out] is the default `MatrixAxes()`, and so are scanned layers [L, in, out]; an attention
    kernel [D, N, H] is `MatrixAxes((0,), (1, 2))`, stacked over layers `MatrixAxes((1,), (2, 3))`.
    """

    rows: tuple[int, ...] = (-2,)
    columns: tuple[int, ...] = (-1,)


Matrices = Any | Callable[[Any], Any] | None
"""A tree like the parameters (or a function that makes one of them) whose leaves say which parameter is a
matrix: `MatrixAxes`, True for `MatrixAxes()`, None or False for no matrix."""


class Matrix(NamedTuple):
    """One selected leaf.

    Attributes:
        index: its place in `jax.tree.leaves(params)`.
        name: its path, such as "layers.attention.q.kernel".
        kind: "attention", "mlp", "embedding" or "other", from the path.
        axes: with non-negative numbers.
        shape: (stack, rows, columns).
    """

    index: int
    name: str
    kind: str
    axes: MatrixAxes
    shape: tuple[int, int, int]


_KINDS = {
    "embedding": r"embed|lm_head|unembed|\bhead\b|\bwte\b|\bwpe\b|vocab",
    "attention": r"att|\b[qkvo](_proj|_einsum)?\b|\bqkv|\bkv_",
    "mlp": r"mlp|ffn|ffw|feed_?forward|\b(gate|up|down)(_proj)?\b|\bw[123i]\b|\bwo\b|expert|\bmoe",
}
_VECTORS = r"bias|norm|scale|\bln(_|\b|\d)|rope|\bb$"  # stacked over layers these have two axes, too


def kind_of(name: str) -> str:
    """What the path of a leaf says it is: "embedding", "attention", "mlp" or "other"."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name.lower())), "other")


def all_matrices(params: Any) -> Any:
    """Every leaf with two axes or more whose name is not that of a bias or a norm, as `MatrixAxes()`."""

    def axes(path, leaf):
        if jnp.ndim(leaf) < 2 or re.search(_VECTORS, path_name(path).lower()):
            return None
        return MatrixAxes()

    return jax.tree_util.tree_map_with_path(axes, params)


def block_matrices(params: Any) -> Any:
    """Those of `all_matrices` that are not embeddings: attention, MLP, and what has another name."""

    def axes(path, leaf, found):
        return None if kind_of(path_name(path)) == "embedding" else found

    return jax.tree_util.tree_map_with_path(axes, params, all_matrices(params))


def path_name(path: tuple) -> str:
    """The dotted name of a key path; what flax wraps around arrays (`.value`) is left out."""
    words = []
    for key in path:
        word = getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
        words.append(str(word).strip("."))
    if len(words) > 1 and words[-1] in ("value", "raw_value"):
        words.pop()
    return ".".join(words)


def select(params: Any, matrices: Matrices, who: str) -> tuple[Matrix, ...]:
    """The matrices of `params`, arrays or `ShapeDtypeStruct`s, in the order of its leaves.

    Args:
        params: any tree; None, `MaskedNode` and leaves of other shapes are passed over.
        matrices: see `Matrices`; None: `block_matrices`.
        who: the transform, for errors.

    Raises:
        ValueError: if nothing is selected, or axes do not fit an array.
    """
    if matrices is None:
        matrices = block_matrices
    wanted = matrices(params) if callable(matrices) else matrices
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    treedef = jax.tree.structure(params)
    try:
        marks = treedef.flatten_up_to(wanted)
    except ValueError as error:
        raise ValueError(f"{who}: `matrices` must be a tree like the parameters: {error}") from None
    found = []
    for index, ((path, leaf), mark) in enumerate(zip(flat, marks, strict=True)):
        if mark is None or mark is False:
            continue
        name, axes = path_name(path), MatrixAxes() if mark is True else mark
        if not isinstance(axes, MatrixAxes):
            raise ValueError(f"{who}: `matrices` has {axes!r} at {name}; use MatrixAxes, a bool or None")
        found.append(Matrix(index, name, kind_of(name), *_shape(jnp.shape(leaf), axes, name, who)))
    if not found:
        names = ", ".join(path_name(path) for path, _ in flat[:8]) + ", ..." * (len(flat) > 8)
        raise ValueError(
            f"{who}: no matrix is selected among the {len(flat)} parameters ({names}); "
            "pass `matrices`, a tree like the parameters with MatrixAxes() or True at each matrix"
        )
    return tuple(found)


def _shape(shape: tuple[int, ...], axes: MatrixAxes, name: str, who: str) -> tuple[MatrixAxes, tuple]:
    given = (*axes.rows, *axes.columns)
    if any(not -len(shape) <= a < len(shape) for a in given):
        raise ValueError(f"{who}: {name} has shape {shape}, which has no axes {axes}")
    rows, columns = (tuple(a % len(shape) for a in part) for part in (axes.rows, axes.columns))
    if len({*rows, *columns}) < len(given) or not rows or not columns:
        raise ValueError(f"{who}: {axes} of {name} names an axis twice, or no rows or no columns")
    sizes = [math.prod(shape[a] for a in part) for part in (rows, columns)]
    stack = math.prod(shape) // max(math.prod(sizes), 1)
    return MatrixAxes(rows, columns), (stack, *sizes)


def to_stack(x: jax.Array, matrix: Matrix) -> jax.Array:
    """The leaf as [stack, rows, columns]."""
    return jnp.transpose(x, _order(x.ndim, matrix.axes)).reshape(matrix.shape)


def from_stack(stack: jax.Array, matrix: Matrix, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_stack`, for a leaf of that shape."""
    order = _order(len(shape), matrix.axes)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return jnp.transpose(stack.reshape([shape[a] for a in order]), inverse)


def _order(ndim: int, axes: MatrixAxes) -> tuple[int, ...]:
    rest = tuple(a for a in range(ndim) if a not in axes.rows + axes.columns)
    return rest + axes.rows + axes.columns
