"""Rewards and advantages of sampled tokens, and estimates that are for looking at only."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from opd_jax.losses._divergences import _float32
from opd_jax.losses._importance import _sampled, discounted_sums


class Advantages(NamedTuple):
    """The parts of an advantage, apart so that they can be logged apart.

    Attributes:
        total: the weighted sum, [B, T] float32.
        task: the part of the task's reward, weight included, [B, T].
        distillation: the teacher's part, weight included, [B, T].
    """

    total: jax.Array
    task: jax.Array
    distillation: jax.Array


def extrapolated_advantages(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    reference_log_probs: ArrayLike,
    scale: float = 1.25,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""ExOPD: the teacher's reward extrapolated beyond the teacher.

    .. math:: A_t = \lambda (\log q(y_t) - \log \pi_\mathrm{ref}(y_t))
        - (\log p(y_t) - \log \pi_\mathrm{ref}(y_t))

    with p the student and q the teacher: the policy gradient of these minimises the reverse KL to
    :math:`\propto q^\lambda \pi_\mathrm{ref}^{1 - \lambda}`. At lambda = 1 it is plain on-policy
    distillation, whatever the reference.

    Args:
        student_log_probs: log p(y_t), [B, T].
        teacher_log_probs: log q(y_t), [B, T].
        reference_log_probs: of the student's start, or of the teacher before its own RL, [B, T].
        scale: lambda, >= 0; the paper uses 1.25.
        where: 1 where a token counts, [B, T]; 0 elsewhere.

    Returns:
        [B, T] float32, without gradient.

    Raises:
        ValueError: if lambda is negative, or the inputs are [B, T, V].
        AssertionError: if the shapes differ or the inputs are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> p, q, ref = (jnp.array([[x]]) for x in (-2.0, -1.0, -3.0))
        >>> print(extrapolated_advantages(p, q, ref), extrapolated_advantages(p, q, ref, scale=1.0))
        [[1.5]] [[1.]]

    References:
        *ExOPD*, `arXiv:2602.12125 <https://arxiv.org/abs/2602.12125>`_
    """
    if not scale >= 0:
        raise ValueError(f"scale must be >= 0, got {scale}")
    student, teacher, reference = _sampled(where, student_log_probs, teacher_log_probs, reference_log_probs)
    return jax.lax.stop_gradient((teacher - student) + (scale - 1.0) * (teacher - reference))


def task_and_distillation(
    task_advantages: ArrayLike,
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    *,
    task_weight: float = 1.0,
    distillation_weight: float = 1.0,
    discount: float = 0.0,
    where: ArrayLike | None = None,
) -> Advantages:
    r"""A task's advantage with the log-ratio to a teacher (or a reference model) as a reward on top.

    .. math:: A_t = a\, A^\mathrm{task}_t + b \sum_{k \ge 0} \gamma^k (\log q(y_{t+k}) - \log p(y_{t+k}))

    In expectation the policy gradient follows a times the task's and b times that of the reverse KL.
    Nothing is whitened: that would take away the scale and the level of the teacher's part.

    Args:
        task_advantages: of completions, [B], or of tokens, [B, T].
        student_log_probs: log p(y_t), [B, T].
        teacher_log_probs: log q(y_t), [B, T].
        task_weight: a.
        distillation_weight: b.
        discount: gamma in [0, 1]; above 0, T must be the whole completion.
        where: 1 where a token counts, [B, T]; 0 elsewhere.

    Returns:
        Total, task and distillation part, [B, T] each, without gradient.

    Raises:
        ValueError: if gamma is not in [0, 1], or the log-probs are [B, T, V].
        AssertionError: if the shapes differ or the inputs are not floating point.

    References:
        Ouyang et al., `arXiv:2203.02155 <https://arxiv.org/abs/2203.02155>`_ (a KL in the reward)
    """
    student, teacher = _sampled(where, student_log_probs, teacher_log_probs)
    task = jnp.asarray(task_advantages, jnp.float32)
    if task.ndim == student.ndim - 1:
        task = jnp.broadcast_to(task[..., None], student.shape)
    (task,) = _sampled(where, task)
    _float32(task, student)  # one shape
    ratio = discounted_sums(jax.lax.stop_gradient(teacher - student), discount, where)
    task, distillation = jax.lax.stop_gradient((task_weight * task, distillation_weight * ratio))
    return Advantages(task + distillation, task, distillation)


def token_reward(
    reward: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    tokens: ArrayLike,
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
) -> jax.Array:
    r"""A user's own per-token reward, after checking that it looks at the sampled token.

    A reward c(s) that depends on the context alone, such as a divergence over the (top-k) vocabulary, has
    expected gradient :math:`\mathbb E_y[c \nabla \log p(y)] = c \nabla \sum_y p(y) = 0`: nothing is learned
    but noise. This is found from the program, before anything runs: its result must depend on `tokens`.

    Args:
        reward: (tokens, student_log_probs, teacher_log_probs) -> [B, T]; traceable.
        tokens: the sampled ones, [B, T] int32.
        student_log_probs: of all tokens, [B, T, V].
        teacher_log_probs: of all tokens, [B, T, V].

    Returns:
        [B, T] float32, without gradient.

    Raises:
        ValueError: if the reward does not depend on the tokens, or has not their shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from opd_jax.losses import reverse_kl
        >>> p, q = jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.log(jnp.array([[[0.25, 0.75]]]))
        >>> token_reward(lambda y, p, q: -reverse_kl(p, q), jnp.array([[0]]), p, q)
        Traceback (most recent call last):
            ...
        ValueError: the reward does not depend on the sampled tokens: ...
    """
    tokens = jnp.asarray(tokens)
    student, teacher = _float32(student_log_probs, teacher_log_probs)
    program = jax.make_jaxpr(reward)(tokens, student, teacher)
    shapes = [a.shape for a in program.out_avals]
    if shapes != [tokens.shape]:
        raise ValueError(f"the reward must be one array of the tokens' shape {tokens.shape}, got {shapes}")
    if not any(_depends(program.jaxpr, [True, False, False])):
        raise ValueError(
            "the reward does not depend on the sampled tokens: a function of the context alone has expected"
            " score-function gradient 0, so that nothing of it is learned. Reward the sampled token's"
            " log-ratio, or differentiate the divergence itself (reverse_kl, top_k)"
        )
    return jax.lax.stop_gradient(reward(tokens, student, teacher).astype(jnp.float32))


_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_jvp_call"}
_CALLS |= {"custom_vjp_call", "custom_vjp_call_jaxpr"}


def _depends(jaxpr: Any, inputs: list[bool]) -> list[bool]:
    """Which outputs of a program can depend on the inputs that are marked."""
    marked = {v for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(variable: Any) -> bool:
        return not hasattr(variable, "val") and variable in marked  # literals are not hashable

    for equation in jaxpr.eqns:
        inputs = [is_marked(v) for v in equation.invars]
        outputs = [any(inputs)] * len(equation.outvars)
        if equation.primitive.name in _CALLS:  # elsewhere any input counts for every output
            inner = next((equation.params[k] for k in ("jaxpr", "call_jaxpr") if k in equation.params), None)
            inner = getattr(inner, "jaxpr", inner)
            if inner is not None and len(inner.invars) == len(inputs):
                outputs = _depends(inner, inputs)
        marked |= {v for v, mark in zip(equation.outvars, outputs, strict=True) if mark}
    return [is_marked(v) for v in jaxpr.outvars]


def kl_estimate(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    kind: Literal["k1", "k2", "k3"] = "k3",
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Estimates of the reverse KL from sampled tokens, to be logged; differentiating them is refused.

    .. math:: k_1 = \ell, \quad k_2 = \ell^2 / 2, \quad k_3 = e^{-\ell} - 1 + \ell,
        \qquad \ell = \log p(y) - \log q(y)

    For y from the student, k1 and k3 are unbiased, k3 is never negative; k2 is biased. Their *gradients* are
    other things: that of k1 has expectation 0, that of k3 is the gradient of the *forward* KL, with
    unbounded weights q / p. To train, use `sampled_reverse_kl`.

    Args:
        student_log_probs: log p(y_t), [B, T]; under differentiation wrap it in `jax.lax.stop_gradient`.
        teacher_log_probs: log q(y_t), [B, T].
        kind: "k1", "k2" or "k3".
        where: 1 where a token counts, [B, T]; 0 elsewhere.

    Returns:
        [B, T] float32.

    Raises:
        ValueError: if the kind is unknown, the inputs are [B, T, V], or it is differentiated.
        AssertionError: if the shapes differ or the inputs are not floating point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> print(kl_estimate(jnp.array([[-1.0]]), jnp.array([[-1.5]])).round(4))
        [[0.1065]]

    References:
        Schulman, *Approximating KL divergence* (2020)
    """
    if kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kind must be 'k1', 'k2' or 'k3', got {kind!r}")
    log_ratio = _metric_only(jnp.subtract(*_sampled(where, student_log_probs, teacher_log_probs)))
    if kind == "k1":
        return log_ratio
    return log_ratio**2 / 2 if kind == "k2" else jnp.expm1(-log_ratio) + log_ratio


@jax.custom_jvp
def _metric_only(log_ratio: jax.Array) -> jax.Array:
    return log_ratio


@_metric_only.defjvp
def _refuse(_primals, _tangents):
    raise ValueError(
        "kl_estimate is a metric and cannot be differentiated: the expected gradient of k1 is 0 and that of"
        " k3 is the forward KL's. Train with sampled_reverse_kl or reverse_kl; to log the estimate under"
        " jax.grad, pass jax.lax.stop_gradient(student_log_probs)"
    )
