"""Divergences between the student's and the teacher's next-token distributions."""

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def reverse_kl(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Reverse Kullback-Leibler divergence KL(student || teacher).

    .. math:: \sum_v p_v (\log p_v - \log q_v)

    with p the student and q the teacher. Differentiated with respect to the student's logits it gives
    :math:`p_j (\log p_j - \log q_j - \mathrm{KL})`. At a state the student visited this is the
    full-vocabulary form of on-policy distillation; how the parameters change *which* states are
    visited is ignored, as in the sampled form with discount 0.

    Args:
        student_log_probs: normalised natural log-probabilities, [..., V].
        teacher_log_probs: the same of the teacher, [..., V].
        axis: the vocabulary.
        where: elements to include in the sum, broadcast against [..., V]; a row of which nothing is
            included has value 0 and gradient 0, whatever its inputs.

    Returns:
        [...] float32, >= 0. Infinite where the teacher gives probability 0 to a token that the student
        can produce; a token of student probability 0 counts 0.

    Raises:
        AssertionError: if the shapes differ or the inputs are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
        >>> print(f"{reverse_kl(p, q):.4f}")
        0.1438

    References:
        Cai et al., *Learning to Foresee*, `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_;
        Gu et al., *MiniLLM*, `arXiv:2306.08543 <https://arxiv.org/abs/2306.08543>`_
    """
    return _kl(*_float32(student_log_probs, teacher_log_probs), axis, where)


def forward_kl(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Forward Kullback-Leibler divergence KL(teacher || student).

    .. math:: \sum_v q_v (\log q_v - \log p_v)

    with p the student and q the teacher. Its gradient in the student's logits is :math:`p_j - q_j`, that
    of the cross-entropy with the teacher's soft labels: it covers all that the teacher may say.

    Args:
        student_log_probs: normalised natural log-probabilities, [..., V].
        teacher_log_probs: the same of the teacher, [..., V].
        axis: the vocabulary.
        where: elements to include in the sum, broadcast against [..., V]; a row of which nothing is
            included has value 0 and gradient 0, whatever its inputs.

    Returns:
        [...] float32, >= 0. Infinite where the student gives probability 0 to a token of the teacher's.

    Raises:
        AssertionError: if the shapes differ or the inputs are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
        >>> print(f"{forward_kl(p, q):.4f}")
        0.1308

    References:
        Hinton et al., `arXiv:1503.02531 <https://arxiv.org/abs/1503.02531>`_
    """
    student, teacher = _float32(student_log_probs, teacher_log_probs)
    return _kl(teacher, student, axis, where)


def total_variation(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Total variation distance.

    .. math:: \tfrac12 \sum_v |p_v - q_v|

    Its gradient in the student's logits is :math:`\tfrac12 p_j (s_j - \sum_v p_v s_v)` with
    :math:`s_v = \mathrm{sign}(p_v - q_v)`: bounded, but of the same size far from the teacher and near it.
    1 minus it is the rate at which speculative decoding accepts the student's tokens.

    Args:
        student_log_probs: normalised natural log-probabilities, [..., V].
        teacher_log_probs: the same of the teacher, [..., V].
        axis: the vocabulary.
        where: elements to include in the sum, broadcast against [..., V].

    Returns:
        [...] float32, from 0 to 1. The subgradient where p = q is 0.

    Raises:
        AssertionError: if the shapes differ or the inputs are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> print(total_variation(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))))
        0.25

    References:
        Wen et al., *f-Divergence Minimization for Sequence-Level Knowledge Distillation*,
        `arXiv:2307.15190 <https://arxiv.org/abs/2307.15190>`_
    """
    student, teacher = _float32(student_log_probs, teacher_log_probs)
    include = True if where is None else jnp.asarray(where, bool)
    student, teacher = (jnp.where(include, a, 0.0) for a in (student, teacher))
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(student) - jnp.exp(teacher)), axis=axis)


def entropy(log_probs: ArrayLike, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    r"""Entropy in nats.

    .. math:: -\sum_v p_v \log p_v

    Args:
        log_probs: normalised natural log-probabilities, [..., V]; -inf counts 0.
        axis: the vocabulary.
        where: elements to include in the sum, broadcast against [..., V].

    Returns:
        [...] float32, >= 0.

    Raises:
        AssertionError: if the input is not floating point.
    """
    (log_probs,) = _float32(log_probs)
    include = log_probs != -jnp.inf
    if where is not None:
        include &= jnp.asarray(where, bool)
    log_probs = jnp.where(include, log_probs, 0.0)
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=axis)


def _kl(first: jax.Array, second: jax.Array, axis: int, where: ArrayLike | None) -> jax.Array:
    """KL(first || second) of float32 log-probs."""
    # A probability of exactly 0 would give 0 * inf, in the value or in the gradient.
    include = first != -jnp.inf
    if where is not None:
        include &= jnp.asarray(where, bool)
    first = jnp.where(include, first, 0.0)
    second = jnp.where(include, second, 0.0)
    terms = jnp.exp(first) * (first - second)
    terms = jnp.where(second == -jnp.inf, jnp.inf, terms)  # also where exp has rounded to 0
    return jnp.sum(jnp.where(include, terms, 0.0), axis=axis)


def _float32(*arrays: ArrayLike) -> tuple[jax.Array, ...]:
    """The arrays as float32, after checking that they are floating point and of one shape."""
    arrays = tuple(jnp.asarray(a) for a in arrays)
    chex.assert_type(arrays, float)
    chex.assert_equal_shape(arrays)
    return tuple(a.astype(jnp.float32) for a in arrays)
