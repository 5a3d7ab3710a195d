r"""Exact spectra in float64 on the host, and what they say.

Singular values are the square roots of the eigenvalues of the Gram matrix of the shorter side, in float64:
for a float32 matrix at a fraction of the cost of an SVD, and more accurate than a float32 SVD. Rounding moves
an eigenvalue by some :math:`\tau s_1^2`, tau about 1e-15, hence

.. math:: |\delta s_i| \le \min(\tau s_1^2 / 2 s_i, \sqrt{\tau} s_1)

which is below 1e-8 s_i for all s_i > 1e-3 s_1 and matters only for matrices whose rank is (nearly) deficient.
What it could do to the effective rank, the measure that feels it most, is bounded for every matrix; where the
bound exceeds 1e-6 relative, the values are taken from an SVD in float64 instead.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

_TAU = 8 * float(np.finfo(np.float64).eps)
_TOLERANCE = 1e-6
_BLOCK = 1 << 21  # elements that are made float64 at once
_EPS32 = float(np.finfo(np.float32).eps)


def singular_values(x: np.ndarray) -> np.ndarray:
    """All singular values of [..., m, n], descending, [..., min(m, n)] float64.

    Raises:
        ValueError: if x is not finite.

    Example:
        >>> import numpy as np
        >>> print(singular_values(np.array([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0]], np.float32)))
        [3. 2.]
    """
    x = np.asarray(x)
    x = x if x.shape[-1] <= x.shape[-2] else np.swapaxes(x, -2, -1)
    stack = x.reshape(-1, *x.shape[-2:]).astype(np.float64)
    if not np.isfinite(stack).all():
        raise ValueError("the matrix holds NaN or infinity")
    values = _from_gram(np.matmul(np.swapaxes(stack, -2, -1), stack))
    for i in np.flatnonzero(_doubtful(values)):
        values[i] = np.linalg.svd(stack[i], compute_uv=False)
    return values.reshape(*x.shape[:-2], x.shape[-1])


def gram(blocks: Iterator[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The Gram matrix of the shorter side, [r, r] float64, of a matrix given in blocks of rows."""
    if shape[0] < shape[1]:
        return _gram_wide(_whole(blocks, shape))
    total = None
    for block in blocks:
        block = block.astype(np.float64)
        part = block.T @ block
        if total is None:
            total = part
        else:
            total += part
    return total


def _gram_wide(x: np.ndarray) -> np.ndarray:
    """x x^T of [m, n], n > m, with no float64 copy of more than some columns of x."""
    columns = max(1, _BLOCK // len(x))
    total = np.zeros((len(x), len(x)))
    for first in range(0, x.shape[1], columns):
        part = x[:, first : first + columns].astype(np.float64)
        total += part @ part.T
    return total


def values_of(
    g: np.ndarray, blocks: Callable[[], Iterator[np.ndarray]], shape: tuple[int, int]
) -> np.ndarray:
    """Singular values [r] of the matrix in blocks whose Gram matrix is g; again from its blocks, by QR of one
    after another and an SVD of R, if g does not tell them well enough."""
    values = _from_gram(g[None])
    if not _doubtful(values)[0]:
        return values[0]
    if max(shape) < 1.3 * min(shape):
        return np.linalg.svd(_whole(blocks(), shape).astype(np.float64), compute_uv=False)
    if shape[0] < shape[1]:
        whole = _whole(blocks(), shape)
        rows = max(1, _BLOCK // len(whole))
        parts = (whole[:, i : i + rows].T for i in range(0, shape[1], rows))
    else:
        parts = blocks()
    r = None
    for part in parts:
        part = part.astype(np.float64)
        r = np.linalg.qr(part if r is None else np.concatenate([r, part]), mode="r")
    return np.linalg.svd(r, compute_uv=False)


def leading_vectors(g: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    """Eigenvectors [r, k] of a Gram matrix g [r, r] that belong to its k largest eigenvalues.

    All of them are computed for up to 1024 rows, above that only the k leading ones by Lanczos, whose result
    counts only if its eigenvalues are the known ones.

    Args:
        g: Gram matrix, float64.
        values: singular values, descending, [r].
        k: how many, at most r.
    """
    r = len(g)
    if r > 1024 and 4 * k < r:
        from scipy.sparse.linalg import ArpackError, eigsh

        start = np.random.default_rng(0).normal(size=r)
        try:
            found, vectors = eigsh(g, k, which="LA", v0=start, ncv=min(r, 3 * k + 20), tol=1e-13, maxiter=60)
        except ArpackError:
            pass
        else:
            order = np.argsort(found)[::-1]
            if np.allclose(found[order], values[:k] ** 2, rtol=0, atol=1e-10 * values[0] ** 2):
                return vectors[:, order]
    return np.linalg.eigh(g)[1][:, ::-1][:, :k]


def _whole(blocks: Iterator[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    whole, first = np.empty(shape, np.float32), 0
    for block in blocks:
        whole[first : first + len(block)] = block
        first += len(block)
    return whole


def _from_gram(g: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(np.linalg.eigvalsh(g), 0.0))[..., ::-1].copy()


def _doubtful(values: np.ndarray) -> np.ndarray:
    """Whether rounding of the Gram matrix [B, r] may have moved the effective rank by more than 1e-6."""
    first = np.where(values[:, :1] > 0, values[:, :1], 1.0)
    s = values / first
    shift = np.minimum(_TAU / 2 / np.maximum(s, math.sqrt(_TAU) / 2), math.sqrt(_TAU))
    total = np.maximum(s.sum(1, keepdims=True), 1.0)
    p = np.maximum(s / total, math.sqrt(_TAU) / total)
    entropy = np.sum(-p * np.log(p), 1)
    bound = np.sum(shift / total * -np.log(p), 1) + (entropy + 1) * np.sum(shift / total, 1)
    return (bound > _TOLERANCE) & (values[:, 0] > 0)


def effective_rank(values: np.ndarray) -> float:
    """exp(-sum p log p), p = s / sum s, of singular values [r]; 0 for a zero matrix."""
    total = values.sum()
    if not total > 0:
        return 0.0
    p = values[values > 0] / total
    return float(np.exp(-np.sum(p * np.log(p))))


def numerical_rank(values: np.ndarray, shape: tuple[int, int]) -> int:
    """How many singular values exceed max(shape) 2^-23 times the largest: what float32 can tell from 0."""
    return int(np.sum(values > max(shape) * _EPS32 * values.max(initial=0.0)))


def leading_energy(values: np.ndarray, rank: int, fractions: Sequence[float]) -> tuple[float, ...]:
    """Shares of ||X||_F^2 in the ceil(fraction * rank) largest singular values; 0 for a zero matrix."""
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    energy = np.cumsum(np.square(values))
    if not energy[-1] > 0:
        return (0.0,) * len(fractions)
    counts = (math.ceil(fraction * rank * (1 - 1e-12)) for fraction in fractions)  # 0.07 * 100 is above 7
    return tuple(float(energy[count - 1] / energy[-1]) for count in counts)
