"""Low-rank adapters: pairs of leaves whose product is what the weights change by."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.transforms._blocks import Product, matmul, transposed
from opd_jax.transforms._matrices import Matrix, to_stack

_FIRST = re.compile(r"(.*?)[._]?lora_?a", re.IGNORECASE)


class Pair(NamedTuple):
    """The leaves A [stack, m, r] and B [stack, r, n] of one adapter, as one matrix.

    Attributes:
        a, b: the leaves.
        name: what their names have in common, such as "layers.attention.q.adapter".
        kind: see `Matrix`.
        shape: (stack, m, n), that of A B.
    """

    a: Matrix
    b: Matrix
    name: str
    kind: str
    shape: tuple[int, int, int]


def paired(found: tuple[Matrix, ...]) -> tuple[Matrix | Pair, ...]:
    """The matrices with `..lora_a` and `..lora_b` made one where they can be multiplied, in A's place."""
    by_name = {matrix.name: matrix for matrix in found}
    pairs = {}
    for a in found:
        match = _FIRST.fullmatch(a.name)
        b = by_name.get(a.name[:-1] + chr(ord(a.name[-1]) + 1))
        if match and b and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1]:
            shape = (a.shape[0], a.shape[1], b.shape[2])
            pairs[a.index] = Pair(a, b, match[1] or "adapter", a.kind, shape)
    seconds = {pair.b.index for pair in pairs.values()}
    return tuple(pairs.get(m.index, m) for m in found if m.index not in seconds)


def change(pair: Pair, params: tuple, updates: tuple, moved: tuple) -> Product:
    r"""By how much A B has changed since A and B were `moved` less.

    .. math:: A B - (A - dA)(B - dB) = [A, dA] \begin{bmatrix} dB \\ B - dB \end{bmatrix}

    Args:
        pair: their leaves.
        params: A and B before the update.
        updates: of A and B.
        moved: dA and dB, up to and with that update.
    """

    def stacks(leaves):
        return [to_stack(x, m).astype(jnp.float32) for x, m in zip(leaves, pair[:2], strict=True)]

    (a, b), (ua, ub), (da, db) = map(stacks, (params, updates, moved))
    a, b = a + ua, b + ub
    return Product(jnp.concatenate([a, da], axis=-1), jnp.concatenate([db, b - db], axis=-2))


def product_norm(x: Product) -> jax.Array:
    """The Frobenius norm, from p x p matrices: ||L R||^2 = sum of (L^T L) * (R R^T)."""
    scales = [jnp.max(jnp.abs(part), axis=(-2, -1), keepdims=True) for part in x]
    left, right = (part / jnp.where(s > 0, s, 1.0) for part, s in zip(x, scales, strict=True))
    square = jnp.sum(matmul(transposed(left), left) * matmul(right, transposed(right)), axis=(-2, -1))
    return jnp.sqrt(jnp.maximum(square, 0.0)) * (scales[0] * scales[1])[..., 0, 0]
