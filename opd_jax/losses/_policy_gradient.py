"""Score-function forms: objectives of the sampled token's log-probability, [B, T] in and out."""

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from opd_jax.losses._divergences import _float32


def sampled_reverse_kl(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    rollout_log_probs: ArrayLike,
    importance_clip: float = 5.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Reverse KL of the sampled token, as a policy gradient with truncated importance weights.

    .. math::
        A_t = \mathrm{sg}(\log q(y_t) - \log p(y_t)), \quad
        w_t = \mathrm{sg}(\min(p(y_t) / p_\mathrm{rollout}(y_t), c)), \quad
        \nabla L_t = -w_t A_t \nabla \log p(y_t)

    with p the student, q the teacher and sg the stop-gradient. When y is drawn from the student
    (w = 1) its expectation is the gradient of the reverse KL at the visited state. The *value* is
    :math:`-w_t A_t`, an unbiased estimate of that KL, so that what is logged is what is minimised.

    Args:
        student_log_probs: log p(y_t) of the sampled tokens under the student being trained, [B, T].
        teacher_log_probs: log q(y_t), [B, T].
        rollout_log_probs: log-probabilities under the policy that sampled the tokens, [B, T].
        importance_clip: c, the upper bound of the importance weight; the paper uses 5.
        where: 1 where a token counts, [B, T]; elsewhere value and gradient are 0 whatever the inputs.

    Returns:
        [B, T] float32.

    Raises:
        ValueError: if `importance_clip` is not positive.
        AssertionError: if the shapes differ or the inputs are not floating point.

    References:
        Cai et al., *Learning to Foresee*, `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    if not importance_clip > 0:
        raise ValueError(f"importance_clip must be positive, got {importance_clip}")
    student, teacher, rollout = _masked(
        where, *_float32(student_log_probs, teacher_log_probs, rollout_log_probs)
    )
    score = student - jax.lax.stop_gradient(student)  # 0, with the gradient of log p
    weight = jnp.minimum(jnp.exp(jax.lax.stop_gradient(student - rollout)), importance_clip)
    log_ratio = jax.lax.stop_gradient(student - teacher)
    return weight * log_ratio * (1.0 + score)


def clipped_policy_gradient(
    log_probs: ArrayLike,
    rollout_log_probs: ArrayLike,
    advantages: ArrayLike,
    clip: tuple[float, float] = (0.2, 0.2),
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Clipped surrogate of proximal policy optimisation, per token.

    .. math:: -\min(r_t A_t, \mathrm{clip}(r_t, 1 - c_\mathrm{low}, 1 + c_\mathrm{high}) A_t),
        \quad r_t = p(y_t) / p_\mathrm{rollout}(y_t)

    Args:
        log_probs: log p(y_t) of the policy being trained, [B, T].
        rollout_log_probs: the same of the policy that sampled, [B, T].
        advantages: [B, T]; no gradient passes through them.
        clip: (c_low, c_high); GRPO uses (0.2, 0.2), DAPO (0.2, 0.28).
        where: 1 where a token counts, [B, T].

    Returns:
        [B, T] float32.

    Raises:
        ValueError: if a clip is negative or the lower one reaches 1.
        AssertionError: if the shapes differ or the inputs are not floating point.

    References:
        Schulman et al., `arXiv:1707.06347 <https://arxiv.org/abs/1707.06347>`_;
        Yu et al., *DAPO*, `arXiv:2503.14476 <https://arxiv.org/abs/2503.14476>`_
    """
    low, high = clip
    if not (0 <= low < 1 and high >= 0):
        raise ValueError(f"clip must be (low, high) with 0 <= low < 1 and high >= 0, got {clip}")
    log_probs, rollout, advantages = _masked(where, *_float32(log_probs, rollout_log_probs, advantages))
    advantages = jax.lax.stop_gradient(advantages)
    ratio = jnp.exp(log_probs - jax.lax.stop_gradient(rollout))
    clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def group_advantages(rewards: ArrayLike, group_size: int, eps: float = 1e-6) -> jax.Array:
    r"""Group-relative advantages of GRPO.

    .. math:: A_i = (r_i - \bar r) / (s + \epsilon)

    with the mean and the sample standard deviation (n - 1 in the denominator, as verl and TRL have it)
    over the `group_size` completions of one prompt.

    Args:
        rewards: [B], the completions of a prompt next to each other.
        group_size: completions a prompt, at least 2; divides B.
        eps: keeps groups of equal rewards at 0.

    Returns:
        [B] float32.

    Raises:
        ValueError: if the group size is below 2 or does not divide B.

    Example:
        >>> print(group_advantages([1.0, 0.0, 1.0, 1.0], 2))
        [ 0.70710576 -0.70710576  0.          0.        ]

    References:
        Shao et al., *DeepSeekMath*, `arXiv:2402.03300 <https://arxiv.org/abs/2402.03300>`_
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    chex.assert_rank(rewards, 1)
    if group_size < 2 or rewards.size % group_size:
        raise ValueError(
            f"group_size must be at least 2 and divide the {rewards.size} rewards, got {group_size}"
        )
    groups = rewards.reshape(-1, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    return (centred / (groups.std(axis=1, ddof=1, keepdims=True) + eps)).reshape(-1)


def _masked(where: ArrayLike | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Zeroes what does not count *before* it is used, so that a NaN there reaches no gradient."""
    if where is None:
        return arrays
    where = jnp.asarray(where, bool)
    return tuple(jnp.where(where, a, 0.0) for a in arrays)
