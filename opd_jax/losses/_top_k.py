"""Divergences that look closely at K tokens only, without forgetting the rest of the vocabulary.

Cutting a divergence off at K tokens goes wrong in the two ways that come to mind first: unnormalised sums
over the K tokens are minimised far from the teacher, and renormalised ones do not see how much mass is
outside. What is left is to keep the rest as one category, or to estimate it by sampling.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from opd_jax.losses._divergences import _float32
from opd_jax.losses._importance import importance_weights

Source = Literal["student", "teacher", "union"]

_REFUSED = {
    "drop": (
        "tail='drop' sums over the support alone, with nothing renormalised: the reverse KL then falls by"
        " pushing the student's mass out of the support (each p_v towards q_v / e), the forward KL by pushing"
        " all of it in, below 0."
    ),
    "renormalise": (
        "tail='renormalise' compares both models within the support only: any amount of the student's mass"
        " outside it is then as good as any other."
    ),
}


class Support(NamedTuple):
    """Tokens that are looked at one by one.

    Attributes:
        ids: [..., K] int32.
        valid: [..., K] bool; False for a token that stands in `ids` already.
    """

    ids: jax.Array
    valid: jax.Array


def top_k_support(
    student_log_probs: ArrayLike, teacher_log_probs: ArrayLike, k: int, source: Source = "student"
) -> Support:
    """The k most likely tokens of the student, of the teacher, or of either.

    Args:
        student_log_probs: [..., V].
        teacher_log_probs: [..., V].
        k: from 1 to V.
        source: "student", "teacher" or "union" (K = 2k entries, those in both counted once).

    Returns:
        The support; it carries no gradient.

    Raises:
        ValueError: if k is out of its range or the source is unknown.
        AssertionError: if the shapes differ or the inputs are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> p, q = jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.log(jnp.array([[0.2, 0.5, 0.3]]))
        >>> support = top_k_support(p, q, 2, "union")
        >>> print(support.ids, support.valid)
        [[0 1 1 2]] [[ True  True False  True]]
    """
    student, teacher = _float32(student_log_probs, teacher_log_probs)
    vocabulary = student.shape[-1]
    if k is None or not 1 <= k <= vocabulary:
        raise ValueError(f"k must be from 1 to the vocabulary's {vocabulary} tokens, got {k}")
    if source not in get_args(Source):
        raise ValueError(f"source must be one of {', '.join(get_args(Source))}, got {source!r}")
    chosen = {"student": [student], "teacher": [teacher], "union": [student, teacher]}[source]
    ids = [jax.lax.top_k(jax.lax.stop_gradient(a), k)[1] for a in chosen]
    valid = [jnp.ones(ids[0].shape, bool)]
    if source == "union":
        valid.append(~(ids[1][..., :, None] == ids[0][..., None, :]).any(-1))
    return Support(jnp.concatenate(ids, axis=-1), jnp.concatenate(valid, axis=-1))


def coarsen(log_probs: ArrayLike, support: Support) -> jax.Array:
    r"""The same distribution over K + 1 categories: the support's tokens, and all others together.

    .. math:: (\log p_{v_1}, \dots, \log p_{v_K}, \log \sum_{v \notin S} p_v)

    Args:
        log_probs: normalised, [..., V].
        support: ids and valid [..., K].

    Returns:
        [..., K + 1] float32, normalised; -inf for entries that are not valid, and for a tail without tokens.

    Raises:
        AssertionError: if `log_probs` is not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> support = Support(jnp.array([2]), jnp.array([True]))
        >>> print(coarsen(jnp.log(jnp.array([0.5, 0.25, 0.25])), support).round(2))
        [-1.39 -0.29]
    """
    (log_probs,) = _float32(log_probs)
    inside = jnp.take_along_axis(log_probs, support.ids, axis=-1)
    inside = jnp.where(support.valid, inside, -jnp.inf)
    # Position by position: on a mesh with Explicit axes it is then known that nothing crosses them.
    mark = jnp.vectorize(lambda row, ids: row.at[ids].set(True), signature="(v),(k)->(v)")
    covered = mark(jnp.zeros_like(log_probs, bool), support.ids)
    # Summed over the others rather than taken as 1 - mass, which cancels where the tail is small. The
    # logarithm of an empty sum has no finite gradient.
    empty = (covered | (log_probs == -jnp.inf)).all(-1, keepdims=True)
    outside = jnp.where(covered & ~empty, -jnp.inf, log_probs)
    outside = jnp.where(empty, 0.0, outside)
    tail = jnp.where(empty, -jnp.inf, jax.nn.logsumexp(outside, axis=-1, keepdims=True))
    return jnp.concatenate([inside, tail], axis=-1)


def with_tail(support_log_probs: ArrayLike) -> jax.Array:
    r"""K + 1 categories from the K log-probs that a cache or a server returned.

    .. math:: (\log q_{v_1}, \dots, \log q_{v_K}, \log (1 - \sum_k q_{v_k}))

    Args:
        support_log_probs: of tokens of a *full* softmax, [..., K]; all different.

    Returns:
        [..., K + 1] float32. A tail below 2^-24 counts as 2^-24, which float32 cannot tell from 0.

    Raises:
        AssertionError: if the input is not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> print(with_tail(jnp.log(jnp.array([0.5, 0.25]))).round(2))
        [-0.69 -1.39 -1.39]
    """
    (inside,) = _float32(support_log_probs)
    mass = jax.nn.logsumexp(inside, axis=-1, keepdims=True)
    tail = jnp.log(-jnp.expm1(jnp.minimum(mass, -(2.0**-24))))
    return jnp.concatenate([inside, tail], axis=-1)


def top_k(
    divergence: Callable[[jax.Array, jax.Array], jax.Array],
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    *,
    k: int | None = None,
    support: Source | Support = "student",
    tail: str = "bucket",
) -> jax.Array:
    r"""A divergence over K + 1 categories: K tokens one by one, all others as one bucket.

    .. math:: D\big((p_{v_1}, \dots, p_{v_K}, 1 - p(S)),\; (q_{v_1}, \dots, q_{v_K}, 1 - q(S))\big)

    At least 0, 0 only where the two agree on these categories, and at most the divergence over the whole
    vocabulary. The gradient is that of this lower bound: within the tail, tokens keep their proportions.

    Args:
        divergence: of log-probabilities, (student, teacher) -> [...], such as `reverse_kl`; a Jensen-Shannon,
            skewed or mixed one with options through `functools.partial`.
        student_log_probs: normalised, [..., V].
        teacher_log_probs: normalised, [..., V].
        k: tokens looked at one by one; needed unless `support` holds them.
        support: whose most likely tokens: "student", "teacher", "union"; or a `Support`.
        tail: "bucket". "drop" and "renormalise" are refused: they are minimised elsewhere than at the
            teacher.

    Returns:
        [...] float32.

    Raises:
        ValueError: for an unknown or refused `tail`, an unknown `support`, or k out of range.
        AssertionError: if the shapes differ or the inputs are not floating point.

    Example:
        >>> import jax.numpy as jnp
        >>> from opd_jax.losses import reverse_kl
        >>> p, q = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.25, 0.5, 0.25]))
        >>> print(f"{top_k(reverse_kl, p, q, k=1):.4f} of {reverse_kl(p, q):.4f}")
        0.1438 of 0.1487

    References:
        *Tail-Aware Top-k On-Policy Distillation*, `arXiv:2608.14728 <https://arxiv.org/abs/2608.14728>`_
    """
    if tail in _REFUSED:
        raise ValueError(
            f"{_REFUSED[tail]} Use tail='bucket', which keeps the rest of the vocabulary as one category"
        )
    if tail != "bucket":
        raise ValueError(
            f"tail must be 'bucket', got {tail!r}; for a sampled tail see sampled_tail_reverse_kl"
        )
    student, teacher = _float32(student_log_probs, teacher_log_probs)
    if not isinstance(support, Support):
        support = top_k_support(student, teacher, k, support)
    return divergence(coarsen(student, support), coarsen(teacher, support))


def sampled_tail_reverse_kl(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    tokens: ArrayLike,
    *,
    k: int,
    support: Source = "student",
    rollout_log_probs: ArrayLike | None = None,
    importance_clip: float = 5.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Reverse KL, exact on K tokens and estimated from the sampled token outside them.

    .. math::
        \nabla L = \sum_{v \in S} p_v \ell_v \nabla \log p_v
            + \mathbb 1[y \notin S]\, w\, \ell_y \nabla \log p_y, \quad \ell_v = \log p_v - \log q_v

    with y sampled from the student and w = min(p(y) / p_rollout(y), c). Unbiased for value and gradient of
    the reverse KL over the whole vocabulary as long as nothing is truncated; the variance is that of the
    tail alone. (Differentiating the sum over S would also differentiate its mass, which the sampled part
    does not give back: the sum's weights carry no gradient.)

    Args:
        student_log_probs: normalised, [..., V].
        teacher_log_probs: normalised, [..., V].
        tokens: the sampled ones, [...] int32.
        k: size of S.
        support: whose k most likely tokens S are; it must not depend on the sampled token.
        rollout_log_probs: of the sampled tokens when they were sampled, [...]; None: on policy, w = 1.
        importance_clip: c.
        where: 1 where a token counts, [...]; elsewhere value and gradient are 0 whatever the inputs.

    Returns:
        [...] float32; single values may be negative.

    Raises:
        ValueError: if k, `support` or `importance_clip` is out of range.
        AssertionError: if the shapes differ or the inputs are not floating point.
    """
    student, teacher = _float32(student_log_probs, teacher_log_probs)
    tokens = jnp.asarray(tokens)
    counts = jnp.ones(tokens.shape, bool) if where is None else jnp.asarray(where, bool)
    student, teacher = (jnp.where(counts[..., None], a, 0.0) for a in (student, teacher))
    chosen = top_k_support(student, teacher, k, support)

    def weighted(p: jax.Array, q: jax.Array, weight: jax.Array, include: jax.Array) -> jax.Array:
        include &= p != -jnp.inf
        p, q = jnp.where(include, p, 0.0), jnp.where(include, q, 0.0)
        score = p - jax.lax.stop_gradient(p)  # 0, with the gradient of log p
        terms = jax.lax.stop_gradient(weight * (p - q)) * (1.0 + score)
        return jnp.where(include, terms, 0.0)

    inside = [jnp.take_along_axis(a, chosen.ids, axis=-1) for a in (student, teacher)]
    exact = weighted(*inside, jnp.exp(inside[0]), chosen.valid & counts[..., None]).sum(-1)
    sampled = [jnp.take_along_axis(a, tokens[..., None], axis=-1)[..., 0] for a in (student, teacher)]
    rollout = sampled[0] if rollout_log_probs is None else rollout_log_probs
    weight = importance_weights(sampled[0], rollout, importance_clip, where=counts)
    outside = ~(tokens[..., None] == chosen.ids).any(-1)
    return exact + weighted(*sampled, weight, outside & counts)
