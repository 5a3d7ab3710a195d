"""Divergences between mixtures of student and teacher, and mixtures of divergences."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from opd_jax.losses._divergences import _float32, entropy, forward_kl, reverse_kl

_ZERO = -1e4  # a log-prob whose exponential is 0, and whose differences are finite


def jsd(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    beta: float = 0.5,
    scaled: bool = False,
) -> jax.Array:
    r"""Generalised Jensen-Shannon divergence, as GKD defines it.

    .. math:: \beta \mathrm{KL}(q \| m) + (1 - \beta) \mathrm{KL}(p \| m), \quad m = \beta q + (1 - \beta) p

    with p the student and q the teacher; bounded by log 2, symmetric at 1/2. It vanishes like
    :math:`\beta\,\mathrm{KL}(q\|p)` as beta -> 0 and like :math:`(1-\beta)\,\mathrm{KL}(p\|q)` as beta -> 1:
    a beta near an end is a small loss, not a KL, and the ends themselves are refused. With `scaled` it is
    divided by :math:`\beta(1-\beta)`: then beta = 0 is the forward KL, beta = 1 the reverse KL, and
    everything between is continuous with both.

    Args:
        student_log_probs: normalised natural log-probabilities, [..., V].
        teacher_log_probs: the same of the teacher, [..., V].
        axis: the vocabulary.
        where: elements to include in the sum, broadcast against [..., V].
        beta: the teacher's share of the mixture, in (0, 1), with `scaled` in [0, 1]; a Python number.
        scaled: divide by beta (1 - beta).

    Returns:
        [...] float32, >= 0 up to rounding; finite for beta in (0, 1) whatever either model excludes.

    Raises:
        ValueError: if beta is out of its range.
        AssertionError: if the shapes differ or the inputs are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
        >>> print(f"{jsd(p, q):.4f} {jsd(p, q, beta=0.001):.6f} {jsd(p, q, beta=0.001, scaled=True):.4f}")
        0.0338 0.000131 0.1308

    References:
        Agarwal et al., *GKD*, `arXiv:2306.13649 <https://arxiv.org/abs/2306.13649>`_
    """
    if scaled and beta in (0, 1):
        end = reverse_kl if beta else forward_kl
        return end(student_log_probs, teacher_log_probs, axis, where)
    if not 0 < beta < 1:
        ends = (
            "beta must be in [0, 1]"
            if scaled
            else "beta must be inside (0, 1): at the ends the divergence is 0 for any student. Use forward_kl"
            " or reverse_kl, or scaled=True, which is continuous with them"
        )
        raise ValueError(f"{ends}; got {beta}")
    student, teacher, include = _finite(student_log_probs, teacher_log_probs, where)
    of_teacher = -jnp.exp(teacher) * _log_mixture(teacher, student, 1 - beta)
    of_student = -jnp.exp(student) * _log_mixture(student, teacher, beta)
    weights = (1 / (1 - beta), 1 / beta) if scaled else (beta, 1 - beta)
    terms = weights[0] * of_teacher + weights[1] * of_student
    return jnp.sum(jnp.where(include, terms, 0.0), axis=axis)


def skew_kl(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    skew: float = 0.1,
) -> jax.Array:
    r"""Skewed forward KL of DistiLLM.

    .. math:: \mathrm{KL}(q \| \lambda q + (1 - \lambda) p)

    with p the student, q the teacher. At lambda = 0 it is the forward KL; above, it is bounded by
    :math:`-\log\lambda`, and no gradient grows where the student gives the teacher's tokens nothing.

    Args:
        student_log_probs: normalised natural log-probabilities, [..., V].
        teacher_log_probs: the same of the teacher, [..., V].
        axis: the vocabulary.
        where: elements to include in the sum, broadcast against [..., V].
        skew: lambda, in [0, 1).

    Returns:
        [...] float32, >= 0 up to rounding.

    Raises:
        ValueError: if lambda is out of its range.
        AssertionError: if the shapes differ or the inputs are not floating point.

    References:
        Ko et al., *DistiLLM*, `arXiv:2402.03898 <https://arxiv.org/abs/2402.03898>`_
    """
    _check_skew(skew)
    if skew == 0:
        return forward_kl(student_log_probs, teacher_log_probs, axis, where)
    student, teacher, include = _finite(student_log_probs, teacher_log_probs, where)
    terms = -jnp.exp(teacher) * _log_mixture(teacher, student, 1 - skew)
    return jnp.sum(jnp.where(include, terms, 0.0), axis=axis)


def skew_reverse_kl(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    skew: float = 0.1,
) -> jax.Array:
    r"""Skewed reverse KL of DistiLLM.

    .. math:: \mathrm{KL}(p \| \lambda p + (1 - \lambda) q)

    with p the student, q the teacher; bounded by :math:`-\log\lambda`, also where the teacher excludes what
    the student can say. At lambda = 0 it is the reverse KL. The gradient passes through both p.

    Args:
        student_log_probs: normalised natural log-probabilities, [..., V].
        teacher_log_probs: the same of the teacher, [..., V].
        axis: the vocabulary.
        where: elements to include in the sum, broadcast against [..., V].
        skew: lambda, in [0, 1).

    Returns:
        [...] float32, >= 0 up to rounding.

    Raises:
        ValueError: if lambda is out of its range.
        AssertionError: if the shapes differ or the inputs are not floating point.

    References:
        Ko et al., *DistiLLM*, `arXiv:2402.03898 <https://arxiv.org/abs/2402.03898>`_
    """
    _check_skew(skew)
    if skew == 0:
        return reverse_kl(student_log_probs, teacher_log_probs, axis, where)
    student, teacher, include = _finite(student_log_probs, teacher_log_probs, where)
    terms = -jnp.exp(student) * _log_mixture(student, teacher, 1 - skew)
    return jnp.sum(jnp.where(include, terms, 0.0), axis=axis)


def mixed_kl(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    forward_weight: ArrayLike = 0.5,
) -> jax.Array:
    r"""A mixture of the forward and the reverse KL.

    .. math:: w\, \mathrm{KL}(q \| p) + (1 - w)\, \mathrm{KL}(p \| q)

    Args:
        student_log_probs: normalised natural log-probabilities, [..., V].
        teacher_log_probs: the same of the teacher, [..., V].
        axis: the vocabulary.
        where: elements to include in the sum, broadcast against [..., V].
        forward_weight: w in [0, 1], a number or [...]; no gradient passes through it. A KL of weight 0
            is left out, also where it is infinite.

    Returns:
        [...] float32, >= 0.

    Raises:
        ValueError: if a weight given as a number is not in [0, 1].
        AssertionError: if the shapes differ or the inputs are not floating point.
    """
    if isinstance(forward_weight, int | float) and not 0 <= forward_weight <= 1:
        raise ValueError(f"forward_weight must be in [0, 1], got {forward_weight}")
    weight = jax.lax.stop_gradient(jnp.asarray(forward_weight, jnp.float32))
    both = student_log_probs, teacher_log_probs, axis
    forward = forward_kl(*both, _where_rows(where, weight > 0, axis))
    reverse = reverse_kl(*both, _where_rows(where, weight < 1, axis))
    return weight * forward + (1 - weight) * reverse


def entropy_aware_kl(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    threshold: float,
) -> jax.Array:
    r"""Reverse KL, and where the teacher is uncertain the forward KL on top of it.

    .. math:: \mathrm{KL}(p \| q) + \mathbb 1[H(q) > \tau]\, \mathrm{KL}(q \| p)

    with p the student, q the teacher and H the entropy: mode-seeking where the teacher knows what to say,
    covering where it leaves several ways open, so that the student stays diverse.

    Args:
        student_log_probs: normalised natural log-probabilities, [..., V].
        teacher_log_probs: the same of the teacher, [..., V].
        axis: the vocabulary.
        where: elements to include in the sums, broadcast against [..., V].
        threshold: tau in nats, >= 0.

    Returns:
        [...] float32, >= 0.

    Raises:
        ValueError: if the threshold is negative.
        AssertionError: if the shapes differ or the inputs are not floating point.

    References:
        Jin et al., *Entropy-Aware On-Policy Distillation*,
        `arXiv:2603.07079 <https://arxiv.org/abs/2603.07079>`_
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be an entropy in nats, >= 0, got {threshold}")
    uncertain = entropy(teacher_log_probs, axis, where) > threshold
    forward = forward_kl(student_log_probs, teacher_log_probs, axis, _where_rows(where, uncertain, axis))
    return reverse_kl(student_log_probs, teacher_log_probs, axis, where) + forward


def _where_rows(where: ArrayLike | None, rows: jax.Array, axis: int) -> jax.Array:
    """Leaves out whole rows: a KL that does not count must give neither inf * 0 nor its gradient."""
    rows = jnp.expand_dims(rows, axis) if rows.ndim else rows
    return rows if where is None else jnp.asarray(where, bool) & rows


def _check_skew(skew: float) -> None:
    if not 0 <= skew < 1:
        raise ValueError(f"skew must be in [0, 1): at 1 the divergence is 0 for any student; got {skew}")


def _finite(
    student_log_probs: ArrayLike, teacher_log_probs: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array | bool]:
    """Both as finite float32 (or NaN), and what to include; probabilities of exactly 0 stay 0."""
    student, teacher = _float32(student_log_probs, teacher_log_probs)
    include = True if where is None else jnp.asarray(where, bool)
    return *(jnp.maximum(jnp.where(include, a, 0.0), _ZERO) for a in (student, teacher)), include


def _log_mixture(base: jax.Array, other: jax.Array, weight: float) -> jax.Array:
    """log((1 - w) e^base + w e^other) - base for w in (0, 1), without cancellation where it is small."""
    weight = min(weight, 1 - 2.0**-24)
    far = 40.0
    difference = other - base
    near = jnp.log1p(weight * jnp.expm1(jnp.minimum(difference, far)))
    beyond = jnp.maximum(difference, far)  # where expm1 could overflow
    beyond += jnp.log(weight + (1 - weight) * jnp.exp(-beyond))
    return jnp.where(difference < far, near, beyond)
