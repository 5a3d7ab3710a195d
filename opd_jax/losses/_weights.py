"""Which tokens count, and how much: functions to be multiplied with each other and with the loss.

All of them are without gradient. Uniform weights are the mask itself.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from opd_jax.losses._importance import _masked, _sampled


def prefix_drift_weights(
    advantages: ArrayLike, strength: float = 0.5, where: ArrayLike | None = None
) -> jax.Array:
    r"""Weights that fall as a completion drifts away from what the teacher would have written (IW-OPD).

    .. math:: w_t = 1 + \gamma (1 - C_{t-1} / C_T), \quad C_t = \sum_{s \le t} |A_s|

    Args:
        advantages: log q(y_t) - log p(y_t) or other, [..., T]; whole completions.
        strength: gamma, >= 0; the paper uses 0.5.
        where: 1 where a token counts, [..., T].

    Returns:
        [..., T] float32, from 1 + gamma down to 1; 0 where nothing counts, and 1 all along a completion
        without any drift.

    Raises:
        ValueError: if gamma is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> print(prefix_drift_weights(jnp.array([[-2.0, 1.0, 1.0]])))
        [[1.5   1.25  1.125]]

    References:
        *IW-OPD*, `arXiv:2606.22600 <https://arxiv.org/abs/2606.22600>`_
    """
    if not strength >= 0:
        raise ValueError(f"strength must be >= 0, got {strength}")
    (drift,) = _sampled(where, advantages)
    drift = jnp.abs(jax.lax.stop_gradient(drift))
    total = drift.sum(-1, keepdims=True)
    before = jnp.cumsum(drift, axis=-1) - drift
    share = jnp.where(total > 0, before / jnp.where(total > 0, total, 1.0), 1.0)
    return _masked(where, 1.0 + strength * (1.0 - share))[0]


def high_entropy(entropies: ArrayLike, fraction: float = 0.2, where: ArrayLike | None = None) -> jax.Array:
    """The tokens of the batch at which the model was least certain.

    Args:
        entropies: of the student's (or teacher's) next-token distributions, [B, T].
        fraction: share of the tokens that count, in (0, 1]; rounded up to whole tokens.
        where: 1 where a token counts, [B, T].

    Returns:
        [B, T] bool: tokens that count and are among the uncertain ones; ties at the border are all in.

    Raises:
        ValueError: if the fraction is not in (0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> print(high_entropy(jnp.array([[0.1, 2.0, 0.3, 9.0]]), 0.5, where=[[1, 1, 1, 0]]))
        [[False  True  True False]]

    References:
        Wang et al., *Beyond the 80/20 Rule*, `arXiv:2506.01939 <https://arxiv.org/abs/2506.01939>`_
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    entropies = jax.lax.stop_gradient(jnp.asarray(entropies).astype(jnp.float32))
    counts = jnp.ones(entropies.shape, bool) if where is None else jnp.asarray(where, bool)
    entropies = jnp.where(counts, entropies, -jnp.inf)
    kept = jnp.ceil(fraction * counts.sum() - 1e-4).astype(jnp.int32)  # 0.2 * 5 is 1, in float32 too
    border = jnp.sort(entropies, axis=None, descending=True)[jnp.maximum(kept, 1) - 1]
    return counts & (entropies >= border)


def loss_mask(
    where: ArrayLike,
    *,
    excluded: ArrayLike | None = None,
    truncated: ArrayLike | None = None,
    tail: int | None = None,
) -> jax.Array:
    """Takes parts of completions out of the loss.

    Args:
        where: 1 for the tokens of a completion, [B, T].
        excluded: 1 for tokens that the student did not choose, such as a tool's output, [B, T].
        truncated: 1 for completions that ran into the length limit, [B].
        tail: how many of their last tokens to leave out; None: the whole completion.

    Returns:
        [B, T] bool.

    Raises:
        ValueError: if `tail` is negative, or given without `truncated`.

    Example:
        >>> print(loss_mask([[1, 1, 1, 0], [1, 1, 1, 1]], truncated=[0, 1], tail=2).astype(int))
        [[1 1 1 0]
         [1 1 0 0]]
    """
    if tail is not None and (truncated is None or tail < 0):
        raise ValueError(f"tail must be >= 0 and come with `truncated`, got {tail}")
    mask = where = jnp.asarray(where, bool)
    if excluded is not None:
        mask &= ~jnp.asarray(excluded, bool)
    if truncated is not None:
        left = jnp.cumsum(where[..., ::-1], axis=-1)[..., ::-1]  # tokens from here to the end
        cut = True if tail is None else left <= tail
        mask &= ~(jnp.asarray(truncated, bool)[..., None] & cut)
    return mask


def top_k_overlap(student_log_probs: ArrayLike, teacher_log_probs: ArrayLike, k: int = 16) -> jax.Array:
    """The share of the student's k most likely tokens that are among the teacher's k.

    Args:
        student_log_probs: or logits, [..., V].
        teacher_log_probs: or logits, [..., V].
        k: at most V.

    Returns:
        [...] float32, from 0 to 1.

    Example:
        >>> import jax.numpy as jnp
        >>> print(top_k_overlap(jnp.array([3.0, 2.0, 1.0, 0.0]), jnp.array([3.0, 0.0, 1.0, 2.0]), k=2))
        0.5
    """
    ids = [jax.lax.top_k(jax.lax.stop_gradient(a), k)[1] for a in (student_log_probs, teacher_log_probs)]
    return (ids[0][..., :, None] == ids[1][..., None, :]).any(-1).mean(-1, dtype=jnp.float32)


def overlap_stop(
    overlap: ArrayLike, window: int, threshold: float, where: ArrayLike | None = None
) -> jax.Array:
    """Where to stop a rollout that the teacher has nothing to say about any more.

    Args:
        overlap: student-teacher overlap at each token, such as `top_k_overlap`, [..., T].
        window: tokens that the running mean is taken over, at least 1.
        threshold: the rollout stops with the first token at which that mean is below; 0 never stops.
        where: 1 for the tokens of a completion, a prefix of each row, [..., T].

    Returns:
        Tokens to keep, [...] int32; all of them where the mean never falls below. No completion is stopped
        before `window` tokens.

    Raises:
        ValueError: if the window is below 1 or the threshold not in [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> print(overlap_stop(jnp.array([[0.9, 0.8, 0.2, 0.1, 0.9], [0.9] * 5]), 2, 0.4))
        [4 5]

    References:
        *Prune-OPD*, `arXiv:2605.07804 <https://arxiv.org/abs/2605.07804>`_
    """
    if window < 1 or not 0 <= threshold <= 1:
        raise ValueError(f"window must be at least 1 and threshold in [0, 1], got {window} and {threshold}")
    overlap = jnp.asarray(overlap).astype(jnp.float32)
    counts = jnp.ones(overlap.shape, bool) if where is None else jnp.asarray(where, bool)
    overlap = jnp.where(counts, overlap, 0.0)
    last = overlap.ndim - 1
    pads = [(0, 0)] * last + [(window - 1, 0)]
    dimensions = (1,) * last + (window,)
    sums = jax.lax.reduce_window(overlap, 0.0, jax.lax.add, dimensions, (1,) * (last + 1), pads)
    whole = jnp.arange(overlap.shape[-1]) >= window - 1
    low = (sums < window * threshold) & whole & counts
    stop = jnp.argmax(low, axis=-1) + 1
    return jnp.where(low.any(-1), stop, counts.sum(-1)).astype(jnp.int32)
