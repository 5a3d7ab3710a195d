"""Correcting for tokens that another policy sampled, and crediting tokens with what comes after them."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from opd_jax.losses._divergences import _float32


def importance_weights(
    log_probs: ArrayLike,
    rollout_log_probs: ArrayLike,
    bound: float = 5.0,
    *,
    level: Literal["token", "sequence"] = "token",
    beyond: Literal["clip", "mask"] = "clip",
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Importance weights of sampled tokens, bounded from above; they carry no gradient.

    .. math:: w_t = \min(p(y_t) / p_\mathrm{rollout}(y_t), c), \qquad
        w = \min\Big(\prod_t p(y_t) / p_\mathrm{rollout}(y_t), c\Big)

    for `level` "token" and "sequence". "clip" keeps a weight above the bound as the bound (the paper: per
    token, 5), "mask" drops it to 0. The first biases towards the policy that sampled, the second leaves
    out what it would not have said.

    Args:
        log_probs: log p(y_t) under the policy being trained, [..., T].
        rollout_log_probs: under the policy that sampled, [..., T].
        bound: c, positive; `inf` for none.
        level: "token", or "sequence": the product over the last axis, the same for all its tokens.
        beyond: "clip" or "mask".
        where: 1 where a token counts, [..., T]; elsewhere the weight is 1, and nothing enters a product.

    Returns:
        [..., T] float32.

    Raises:
        ValueError: if the bound is not positive or an option is unknown.
        AssertionError: if the shapes differ or the inputs are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> p, rollout = jnp.log(jnp.array([[0.9, 0.25]])), jnp.log(jnp.array([[0.1, 0.5]]))
        >>> print(importance_weights(p, rollout), importance_weights(p, rollout, level="sequence"))
        [[5.  0.5]] [[4.5 4.5]]

    References:
        Cai et al., *Learning to Foresee*, `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    if not bound > 0:
        raise ValueError(f"the bound of importance weights must be positive, got {bound}")
    if level not in ("token", "sequence") or beyond not in ("clip", "mask"):
        raise ValueError(
            f"level must be 'token' or 'sequence' and beyond 'clip' or 'mask', got {level!r} and {beyond!r}"
        )
    log_ratio = jnp.subtract(*_masked(where, *_float32(log_probs, rollout_log_probs)))
    log_ratio = jax.lax.stop_gradient(log_ratio)
    if level == "sequence":
        log_ratio = jnp.broadcast_to(log_ratio.sum(-1, keepdims=True), log_ratio.shape)
        if where is not None:
            log_ratio = jnp.where(jnp.asarray(where, bool), log_ratio, 0.0)
    ratio = jnp.exp(log_ratio)
    return jnp.minimum(ratio, bound) if beyond == "clip" else jnp.where(ratio > bound, 0.0, ratio)


def discounted_sums(values: ArrayLike, discount: float, where: ArrayLike | None = None) -> jax.Array:
    r"""What follows from each token on, discounted.

    .. math:: G_t = \sum_{k \ge 0} \gamma^k x_{t + k}

    Args:
        values: x, [..., T].
        discount: gamma, from 0 (x itself) to 1 (all that follows counts in full).
        where: 1 where a value counts, [..., T]; others are 0, and their place still counts as a step.

    Returns:
        [..., T] float32; 0 where nothing counts.

    Raises:
        ValueError: if gamma is not in [0, 1].
        AssertionError: if the values are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> print(discounted_sums(jnp.array([1.0, 2.0, 4.0]), 0.5))
        [3. 4. 4.]

    References:
        Gu et al., *MiniLLM*, `arXiv:2306.08543 <https://arxiv.org/abs/2306.08543>`_
    """
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must be in [0, 1], got {discount}")
    (values,) = _masked(where, *_float32(values))
    if discount == 0:
        return values
    if discount == 1:
        sums = jax.lax.cumsum(values, axis=values.ndim - 1, reverse=True)
    else:

        def join(later, earlier):
            return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

        factors = jnp.full_like(values, discount)
        _, sums = jax.lax.associative_scan(join, (factors, values), reverse=True, axis=values.ndim - 1)
    return _masked(where, sums)[0]


def _sampled(where: ArrayLike | None, *arrays: ArrayLike) -> tuple[jax.Array, ...]:
    """Float32 values of sampled tokens, [B, T] or [T], zeroed where they do not count."""
    arrays = _float32(*arrays)
    if arrays[0].ndim > 2:
        raise ValueError(
            f"needs the log-probs of the sampled tokens, [B, T], got {arrays[0].shape}. What is computed from"
            " whole distributions is the same for every token that could be sampled, so that as a reward its"
            " expected gradient is 0; differentiate a divergence of distributions instead (reverse_kl)"
        )
    return _masked(where, *arrays)


def _masked(where: ArrayLike | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Zeroes what does not count *before* it is used, so that a NaN there reaches no gradient."""
    if where is None:
        return arrays
    where = jnp.asarray(where, bool)
    return tuple(jnp.where(where, a, 0.0) for a in arrays)
