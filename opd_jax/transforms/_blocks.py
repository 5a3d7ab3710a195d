"""Block subspace iteration for many matrices at once; `spectrum` has the public face of it.

All that is factorised is k x k. Factors of all matrices go through one batched call, whatever their shapes:
on TPU each call of a Cholesky or an eigh costs seconds of compilation, and megabytes of program.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
EPS = float(jnp.finfo(jnp.float32).eps)
TINY = float(jnp.finfo(jnp.float32).tiny)


class Subspace(NamedTuple):
    """The leading singular directions of x [..., m, n], as far as they have been found.

    Attributes:
        left: [..., m, k] float32, orthonormal columns.
        singular_values: [..., k] float32, descending.
        right: [..., n, k] float32, orthonormal columns.
    """

    left: jax.Array
    singular_values: jax.Array
    right: jax.Array


class Product(NamedTuple):
    """left [stack, m, p] @ right [stack, p, n], float32, which is never multiplied out."""

    left: jax.Array
    right: jax.Array


def transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -2, -1)


def subspace_steps(xs: Sequence[jax.Array | Product], vs: Sequence[jax.Array]) -> list[Subspace]:
    """`spectrum.subspace_step` of each x [stack, m, n] float32 and its v [stack, n, k]."""
    lefts = orthonormal([_times(x, v) for x, v in zip(xs, vs, strict=True)])
    images = [_times_transposed(x, left) for x, left in zip(xs, lefts, strict=True)]
    # Without a scale squares leave float32's range.
    scales = [jnp.max(jnp.abs(image), axis=(-2, -1), keepdims=True) for image in images]
    images = [image / jnp.where(s > 0, s, 1.0) for image, s in zip(images, scales, strict=True)]
    grams = [matmul(transposed(image), image) for image in images]
    # Eigenvalues ascend, singular values descend.
    rotations = batched(lambda gram: jnp.linalg.eigh(gram, symmetrize_input=True)[1][..., ::-1], grams)
    lefts = [matmul(left, rotation) for left, rotation in zip(lefts, rotations, strict=True)]
    images = [matmul(image, rotation) for image, rotation in zip(images, rotations, strict=True)]
    # Lengths are more accurate than eigenvalues.
    values = [
        jnp.sqrt(jnp.sum(image * image, axis=-2)) * scale[..., 0]
        for image, scale in zip(images, scales, strict=True)
    ]
    return [Subspace(*found) for found in zip(lefts, values, orthonormal(images), strict=True)]


def _times(x: jax.Array | Product, v: jax.Array) -> jax.Array:
    return matmul(x.left, matmul(x.right, v)) if isinstance(x, Product) else matmul(x, v)


def _times_transposed(x: jax.Array | Product, u: jax.Array) -> jax.Array:
    if isinstance(x, Product):
        return matmul(transposed(x.right), matmul(transposed(x.left), u))
    return matmul(transposed(x), u)


def orthonormal(ys: Sequence[jax.Array]) -> list[jax.Array]:
    """`spectrum.cholesky_qr2` of each y [stack, m, k] float32; those of one shape as one."""
    return batched(None, ys, _orthonormal)


def batched(
    function: Callable | None, arrays: Sequence[jax.Array], on_list: Callable | None = None
) -> list[jax.Array]:
    """`function` of each array [stack, ...], called once for each shape [...] with all stacks in one.

    Args:
        function: of [stack, ...] to an array with that stack.
        arrays: what it takes.
        on_list: in place of it, of a list of arrays with different shapes to such a list.
    """
    groups: dict[tuple, list[int]] = {}
    for i, array in enumerate(arrays):
        groups.setdefault(array.shape[1:], []).append(i)
    joined = [
        arrays[group[0]] if len(group) == 1 else jnp.concatenate([arrays[i] for i in group])
        for group in groups.values()
    ]
    results = on_list(joined) if on_list else [function(array) for array in joined]
    out = [arrays[0]] * len(arrays)
    for group, result in zip(groups.values(), results, strict=True):
        start = 0
        for i in group:
            end = start + arrays[i].shape[0]
            out[i] = result if len(group) == 1 else result[start:end]
            start = end
    return out


def _orthonormal(ys: list[jax.Array]) -> list[jax.Array]:
    """Of matrices with different shapes: k x k factors together, all else apart."""
    noises, qs = [], []
    for y in ys:
        m, k = y.shape[-2:]
        noise = jax.random.normal(jax.random.key(m * 8191 + k), (m, k), jnp.float32) / math.sqrt(m)
        scale = jnp.max(jnp.abs(y), axis=(-2, -1), keepdims=True)
        y = y / jnp.where(scale > 0, scale, 1.0)  # squares neither overflow nor vanish
        norms = jnp.sqrt(jnp.sum(y * y, axis=-2, keepdims=True))
        # A column far below the largest is rounding: so small a singular value float32 cannot tell from 0.
        floor = 8 * EPS * jnp.max(norms, axis=-1, keepdims=True)
        qs.append(jnp.where(norms > floor, y / jnp.maximum(norms, TINY), noise))
        noises.append(noise)

    def again(i, qs):  # a loop, since on TPU every Cholesky in the program costs seconds of compilation
        qs = _cholesky_pass(qs, jnp.array([4.0, 1.0, 0.0], jnp.float32)[i])
        # What depends on earlier columns has lost most of its length to the first pass's shift.
        lengths = [jnp.sum(q * q, axis=-2, keepdims=True) for q in qs]
        return [jnp.where(n > 0.25, q, noise) for q, n, noise in zip(qs, lengths, noises, strict=True)]

    return lax.fori_loop(0, 3, again, qs)


def _cholesky_pass(qs: list[jax.Array], shift: jax.Array) -> list[jax.Array]:
    """Q R^-1 with R^T R = Q^T Q + shift k eps."""

    def inverse(gram):
        k = gram.shape[-1]
        eye = jnp.broadcast_to(jnp.eye(k, dtype=gram.dtype), gram.shape)
        factor = lax.linalg.cholesky(gram + shift * k * EPS * eye, symmetrize_input=False)
        return lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)

    inverses = batched(inverse, [matmul(transposed(q), q) for q in qs])
    return [matmul(q, transposed(r)) for q, r in zip(qs, inverses, strict=True)]
