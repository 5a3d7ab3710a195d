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
    student_log_probs, teacher_log_probs = _float32(student_log_probs, teacher_log_probs)
    # A student probability of exactly 0 would give 0 * inf, in the value or in the gradient.
    include = student_log_probs != -jnp.inf
    if where is not None:
        include &= jnp.asarray(where, bool)
    student = jnp.where(include, student_log_probs, 0.0)
    teacher = jnp.where(include, teacher_log_probs, 0.0)
    terms = jnp.exp(student) * (student - teacher)
    terms = jnp.where(teacher == -jnp.inf, jnp.inf, terms)  # also where exp has rounded to 0
    return jnp.sum(jnp.where(include, terms, 0.0), axis=axis)


def _float32(*arrays: ArrayLike) -> tuple[jax.Array, ...]:
    """The arrays as float32, after checking that they are floating point and of one shape."""
    arrays = tuple(jnp.asarray(a) for a in arrays)
    chex.assert_type(arrays, float)
    chex.assert_equal_shape(arrays)
    return tuple(a.astype(jnp.float32) for a in arrays)
