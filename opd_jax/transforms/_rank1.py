"""The AlphaRL / AlphaOPD baseline: the rank-1 part of the displacement, extrapolated once."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.transforms._matrices import Matrices, Matrix, from_stack, select, to_stack
from opd_jax.transforms.extrapolation import _leaves_like


def predict_rank1(
    base: Any,
    checkpoints: Sequence[Any],
    progress: Sequence[float],
    target: float = 1.0,
    matrices: Matrices = None,
    standardize: bool = True,
) -> Any:
    r"""Parameters predicted for a later progress, from the first singular triples of early checkpoints.

    .. math:: W_j - W_\mathrm{base} \approx s_j u_j v_j^T, \qquad
        x_j = s_j u_j, \qquad \hat W = W_\mathrm{base} + \hat x(\mathrm{target})\, v_J^T

    x is regressed on progress by PLS with one component. As the authors' code does it, that is the component
    t of x with the greatest covariance with progress, a line of progress over t, which is inverted at the
    target, and x back from t by its loadings. Nothing is iterative: two dot products for each matrix.

    Runs on the host with one SVD in float64 for each matrix and checkpoint; no part of a step.

    The paper leaves open, and this is what is done here: *progress* is any number that should grow on the
    way (the authors use accuracies of checkpoints; a fraction of the steps works as well). *Signs* of x_j
    are such that v_j points to the side of v_J, that of the last checkpoint. *Scale*: the authors' code
    divides each coordinate of x by its standard deviation over the checkpoints, `standardize`. *Where it is
    added*: to the base, and parameters that are not `matrices` stay the base's. A matrix that did not move
    in any checkpoint stays; one whose x has no covariance with progress keeps its last rank-1 part.

    Args:
        base: parameters before training.
        checkpoints: trees like it, in order; 2 or more.
        progress: of each checkpoint; not all equal.
        target: the progress to predict for.
        matrices: see `MatrixAxes`; default: `block_matrices`. Stacked layers are treated singly.
        standardize: see above.

    Returns:
        A tree like `base`, with its dtypes and shardings.

    Raises:
        ValueError: if there are fewer than 2 checkpoints, not one progress for each, all progress is equal or
            some not finite, or a checkpoint is no tree like the base.

    Example:
        >>> import jax.numpy as jnp
        >>> at = lambda t: {"up": jnp.eye(2) + t * jnp.array([[1.0, 2.0], [2.0, 4.0]])}
        >>> print(predict_rank1(at(0.0), [at(0.1), at(0.2)], [0.1, 0.2])["up"].round(4))
        [[2. 2.]
         [2. 5.]]

    References:
        Cai et al., `arXiv:2510.00553 <https://arxiv.org/abs/2510.00553>`_ (AlphaRL);
        `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_ (as a baseline of distillation)
    """
    y = np.asarray(progress, np.float64)
    if len(checkpoints) < 2 or y.shape != (len(checkpoints),):
        raise ValueError(
            f"predict_rank1 needs at least 2 checkpoints and the progress of each, got {len(checkpoints)} "
            f"and progress of shape {y.shape}"
        )
    if not np.isfinite([*y, target]).all() or np.ptp(y) == 0:
        raise ValueError(f"progress must be finite and not all equal, got {y.tolist()}, target {target}")
    found = select(base, matrices, "predict_rank1")
    leaves, treedef = jax.tree.flatten(base)
    others = [_leaves_like(c, base, f"predict_rank1: checkpoint {i}") for i, c in enumerate(checkpoints)]
    for matrix in found:
        start = leaves[matrix.index]
        stacks = [_stack(leaf[matrix.index], matrix) for leaf in others]
        first = _stack(start, matrix)
        moved = [
            first[i] + _predicted([stack[i] - first[i] for stack in stacks], y, target, standardize)
            for i in range(len(first))
        ]
        new = from_stack(np.stack(moved), matrix, start.shape).astype(start.dtype)
        leaves[matrix.index] = jax.device_put(new, start.sharding) if isinstance(start, jax.Array) else new
    return jax.tree.unflatten(treedef, leaves)


def _stack(leaf: Any, matrix: Matrix) -> np.ndarray:
    return np.asarray(to_stack(jnp.asarray(leaf), matrix), np.float64)


def _predicted(
    displacements: list[np.ndarray], y: np.ndarray, target: float, standardize: bool
) -> np.ndarray:
    """The displacement of one matrix at the target."""
    triples = [np.linalg.svd(d, full_matrices=False) for d in displacements]
    last = triples[-1][2][0]
    x = np.stack([s[0] * u[:, 0] * (-1.0 if v[0] @ last < 0 else 1.0) for u, s, v in triples])
    return np.outer(_inverse_pls(x, y, target, standardize), last)


def _inverse_pls(x: np.ndarray, y: np.ndarray, target: float, standardize: bool) -> np.ndarray:
    """x [J, m] where PLS of y [J] on it, with one component, gives the target; [m]."""
    mean, centred = x.mean(0), y - y.mean()
    scale = x.std(0, ddof=1) if standardize else np.ones(x.shape[1])
    scale[scale == 0] = 1.0
    x_scaled = (x - mean) / scale
    weights = x_scaled.T @ centred
    if not weights.any():
        return x[-1]
    scores = x_scaled @ (weights / np.linalg.norm(weights))
    squared = scores @ scores
    loadings, slope = x_scaled.T @ scores / squared, centred @ scores / squared
    return mean + scale * loadings * (target - y.mean()) / slope
