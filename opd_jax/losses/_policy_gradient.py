"""Score-function forms: objectives of the sampled token's log-probability, [B, T] in and out."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from opd_jax.losses._importance import _sampled, discounted_sums, importance_weights


def sampled_reverse_kl(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    rollout_log_probs: ArrayLike,
    importance_clip: float = 5.0,
    where: ArrayLike | None = None,
    *,
    discount: float = 0.0,
    level: Literal["token", "sequence"] = "token",
    beyond: Literal["clip", "mask"] = "clip",
) -> jax.Array:
    r"""Reverse KL of the sampled token, as a policy gradient with truncated importance weights.

    .. math::
        A_t = \mathrm{sg}\Big(\sum_{k \ge 0} \gamma^k (\log q(y_{t+k}) - \log p(y_{t+k}))\Big), \quad
        w_t = \mathrm{sg}(\min(p(y_t) / p_\mathrm{rollout}(y_t), c)), \quad
        \nabla L_t = -w_t A_t \nabla \log p(y_t)

    with p the student, q the teacher and sg the stop-gradient. When y is drawn from the student
    (w = 1) its expectation is the gradient of the reverse KL at the visited state for gamma = 0, and
    for gamma = 1, summed over t, the gradient of the reverse KL between whole completions. The *value*
    is :math:`-w_t A_t`: for gamma = 0 an unbiased estimate of that KL, so that what is logged is what
    is minimised.

    Args:
        student_log_probs: log p(y_t) of the sampled tokens under the student being trained, [B, T].
        teacher_log_probs: log q(y_t), [B, T].
        rollout_log_probs: log-probabilities under the policy that sampled the tokens, [B, T].
        importance_clip: c, the upper bound of the importance weight; the paper uses 5.
        where: 1 where a token counts, [B, T]; elsewhere value and gradient are 0 whatever the inputs.
        discount: gamma in [0, 1]; above 0, T must be the whole completion.
        level: of the importance weights, see `importance_weights`; "sequence" needs whole completions.
        beyond: "clip" a weight at c, or "mask" the token.

    Returns:
        [B, T] float32.

    Raises:
        ValueError: if `importance_clip` is not positive, gamma is not in [0, 1], or the inputs are whole
            distributions, [B, T, V].
        AssertionError: if the shapes differ or the inputs are not floating point.

    References:
        Cai et al., *Learning to Foresee*, `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_;
        Gu et al., *MiniLLM*, `arXiv:2306.08543 <https://arxiv.org/abs/2306.08543>`_ (gamma = 1)
    """
    student, teacher, rollout = _sampled(where, student_log_probs, teacher_log_probs, rollout_log_probs)
    advantages = discounted_sums(jax.lax.stop_gradient(teacher - student), discount, where)
    return policy_gradient(student, rollout, advantages, importance_clip, where, level=level, beyond=beyond)


def policy_gradient(
    log_probs: ArrayLike,
    rollout_log_probs: ArrayLike,
    advantages: ArrayLike,
    importance_clip: float = 5.0,
    where: ArrayLike | None = None,
    *,
    level: Literal["token", "sequence"] = "token",
    beyond: Literal["clip", "mask"] = "clip",
) -> jax.Array:
    r"""Policy gradient of given advantages, with truncated importance weights.

    .. math:: L_t = -w_t A_t, \quad \nabla L_t = -w_t A_t \nabla \log p(y_t)

    Unlike a PPO clip, a truncated weight never stops the gradient of a token. Neither weight nor
    advantage carries one.

    Args:
        log_probs: log p(y_t) of the policy being trained, [B, T].
        rollout_log_probs: the same of the policy that sampled, [B, T].
        advantages: A, [B, T]; for example from `extrapolated_advantages` or `task_and_distillation`.
        importance_clip: c, the upper bound of the importance weight.
        where: 1 where a token counts, [B, T]; elsewhere value and gradient are 0 whatever the inputs.
        level: of the importance weights, see `importance_weights`.
        beyond: "clip" a weight at c, or "mask" the token.

    Returns:
        [B, T] float32.

    Raises:
        ValueError: if `importance_clip` is not positive, or the inputs are [B, T, V].
        AssertionError: if the shapes differ or the inputs are not floating point.
    """
    if not importance_clip > 0:
        raise ValueError(f"importance_clip must be positive, got {importance_clip}")
    log_probs, rollout, advantages = _sampled(where, log_probs, rollout_log_probs, advantages)
    weights = importance_weights(log_probs, rollout, importance_clip, level=level, beyond=beyond, where=where)
    score = log_probs - jax.lax.stop_gradient(log_probs)  # 0, with the gradient of log p
    return weights * -jax.lax.stop_gradient(advantages) * (1.0 + score)


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
        ValueError: if a clip is negative or the lower one reaches 1, or the inputs are [B, T, V].
        AssertionError: if the shapes differ or the inputs are not floating point.

    References:
        Schulman et al., `arXiv:1707.06347 <https://arxiv.org/abs/1707.06347>`_;
        Yu et al., *DAPO*, `arXiv:2503.14476 <https://arxiv.org/abs/2503.14476>`_
    """
    low, high = clip
    if not (0 <= low < 1 and high >= 0):
        raise ValueError(f"clip must be (low, high) with 0 <= low < 1 and high >= 0, got {clip}")
    log_probs, rollout, advantages = _sampled(where, log_probs, rollout_log_probs, advantages)
    advantages = jax.lax.stop_gradient(advantages)
    ratio = jnp.exp(log_probs - jax.lax.stop_gradient(rollout))
    clipped = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def group_advantages(
    rewards: ArrayLike, group_size: int, eps: float = 1e-6, *, normalise: bool = True
) -> jax.Array:
    r"""Group-relative advantages of GRPO, or of Dr. GRPO without the division.

    .. math:: A_i = (r_i - \bar r) / (s + \epsilon) \quad\text{or}\quad A_i = r_i - \bar r

    with the mean and the sample standard deviation (n - 1 in the denominator, as verl and TRL have it)
    over the `group_size` completions of one prompt. Dividing by s weighs prompts up whose rewards differ
    little, very easy and very hard ones.

    Args:
        rewards: [B], the completions of a prompt next to each other.
        group_size: completions a prompt, at least 2; divides B.
        eps: keeps groups of equal rewards at 0.
        normalise: divide by the standard deviation (GRPO, DAPO); False for Dr. GRPO.

    Returns:
        [B] float32.

    Raises:
        ValueError: if the group size is below 2 or does not divide B.

    Example:
        >>> print(group_advantages([1.0, 0.0, 1.0, 1.0], 2))
        [ 0.70710576 -0.70710576  0.          0.        ]

    References:
        Shao et al., *DeepSeekMath*, `arXiv:2402.03300 <https://arxiv.org/abs/2402.03300>`_;
        Liu et al., *Dr. GRPO*, `arXiv:2503.20783 <https://arxiv.org/abs/2503.20783>`_
    """
    groups = _groups(rewards, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    if normalise:
        centred /= groups.std(axis=1, ddof=1, keepdims=True) + eps
    return centred.reshape(-1)


def _groups(rewards: ArrayLike, group_size: int) -> jax.Array:
    """[B] -> [B / group_size, group_size] float32."""
    rewards = jnp.asarray(rewards, jnp.float32)
    chex.assert_rank(rewards, 1)
    if group_size < 2 or rewards.size % group_size:
        raise ValueError(
            f"group_size must be at least 2 and divide the {rewards.size} rewards, got {group_size}"
        )
    return rewards.reshape(-1, group_size)
