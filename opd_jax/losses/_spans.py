"""Pieces of text as actions: distillation between two tokenizers."""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from opd_jax.losses._importance import _sampled, discounted_sums, importance_weights


def span_sums(
    log_probs: ArrayLike, spans: ArrayLike, count: int, where: ArrayLike | None = None
) -> jax.Array:
    r"""Log-probs of spans: sums over the tokens of each.

    .. math:: S_i = \sum_{t:\, s_t = i} x_t

    Args:
        log_probs: x, of tokens, [B, N].
        spans: s, each token's span, [B, N] int32; one outside [0, count), such as -1, enters no sum.
        count: spans a row; static.
        where: 1 where a token counts, [B, N]; others enter no sum, whatever they are.

    Returns:
        [B, count] float32; 0 for a span without tokens.

    Raises:
        ValueError: if the log-probs have more than 2 axes.
        AssertionError: if the shapes differ, the log-probs are not floating point or the spans not integer.

    Example:
        >>> import jax.numpy as jnp
        >>> print(span_sums(jnp.array([[-1.0, -2.0, -4.0, -8.0]]), jnp.array([[0, 0, 1, -1]]), 2))
        [[-3. -4.]]
    """
    spans = jnp.asarray(spans)
    chex.assert_type(spans, int)
    known = (spans >= 0) & (spans < count)
    if where is not None:
        known &= jnp.asarray(where, bool)
    (values,) = _sampled(known, log_probs)
    chex.assert_equal_shape([values, spans])
    chex.assert_rank(values, 2)
    places = jnp.clip(spans, 0, count - 1)  # of what is outside, too: it is 0
    return jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, count))(values, places)


def span_reverse_kl(
    student_log_probs: ArrayLike,
    student_spans: ArrayLike,
    teacher_log_probs: ArrayLike,
    teacher_spans: ArrayLike,
    rollout_log_probs: ArrayLike | None = None,
    importance_clip: float = 5.0,
    where: ArrayLike | None = None,
    *,
    discount: float = 0.0,
    beyond: Literal["clip", "mask"] = "clip",
) -> jax.Array:
    r"""Reverse KL of sampled spans, as a policy gradient: `sampled_reverse_kl` between two tokenizers.

    .. math::
        A_i = \mathrm{sg}\Big(\sum_{k \ge 0} \gamma^k (\log q_{i+k} - \log p_{i+k})\Big), \quad
        w_i = \mathrm{sg}(\min(p_i / p_{\mathrm{rollout},i}, c)), \quad
        \nabla L_t = -w_i A_i \nabla \log p(y_t)

    for every student token t of span i, with :math:`\log p_i` and :math:`\log q_i` the sums of the log-probs
    of the student's and of the teacher's tokens in it, and sg the stop-gradient. The span is the action: it
    has one advantage and one importance weight. The value of a token is :math:`-w_i A_i / n_i`, n the
    student's tokens in the span, so that values sum to the estimate of the KL. Where every span has one token
    of each, this is `sampled_reverse_kl`.

    What is exact: if the prefix decides where a span begins and ends, the expectation over the student's
    spans is the gradient of the reverse KL between the laws p and q of the next span (gamma = 0), or of the
    rest of the completion (gamma = 1, summed over spans). What is not:

    - q is the teacher's probability of *one* tokenisation of the text, the canonical one. Others spell the
      same bytes, so it is a lower bound of the text's probability, and the law q sums to at most 1. Likewise
      p is the probability of the tokens that the student sampled, not of their text.
    - Where a tokenizer splits the text can depend on what comes later. What a token then does to the spans
      before it (where they end, how the teacher spells them) is left out, for every gamma.
    - Tokens outside spans (a character cut at the end, special tokens within the text) have no teacher:
      value and gradient are 0.

    Args:
        student_log_probs: log p(y_t) of the sampled tokens under the student being trained, [B, N].
        student_spans: each token's span from 0 to N - 1, -1 = none, [B, N] int32, from `tasks.retokenize`.
        teacher_log_probs: of the same text's tokens in the teacher's tokenizer, [B, M].
        teacher_spans: their spans, -1 = none, [B, M] int32.
        rollout_log_probs: of the student's tokens when they were sampled, [B, N]; None: on policy, w = 1.
        importance_clip: c, the upper bound of a span's importance weight.
        where: 1 where a student's token counts, [B, N]. A span counts if all of its tokens do.
        discount: gamma in [0, 1], per span; above 0, N must be the whole completion.
        beyond: "clip" a weight at c, or "mask" the span.

    Returns:
        [B, N] float32; 0, with gradient 0, outside the spans that count, whatever the inputs.

    Raises:
        ValueError: if `importance_clip` is not positive, gamma is not in [0, 1], or the log-probs are
            whole distributions, [B, N, V].
        AssertionError: if shapes differ or dtypes are wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> p, q = jnp.array([[-1.0, -2.0, -1.0]]), jnp.array([[-2.5, -3.0]])
        >>> print(span_reverse_kl(p, jnp.array([[0, 0, 1]]), q, jnp.array([[0, 1]])))
        [[-0.25 -0.25  2.  ]]

    References:
        Boizard et al., *ULD*, `arXiv:2402.12030 <https://arxiv.org/abs/2402.12030>`_ (distillation across
        tokenizers); Gu et al., *MiniLLM*, `arXiv:2306.08543 <https://arxiv.org/abs/2306.08543>`_
    """
    if not importance_clip > 0:
        raise ValueError(f"importance_clip must be positive, got {importance_clip}")
    spans, teacher_spans = jnp.asarray(student_spans), jnp.asarray(teacher_spans)
    count = spans.shape[-1]  # each span has a student's token
    inside = spans >= 0
    counted = inside if where is None else inside & jnp.asarray(where, bool)

    def tokens(which: jax.Array, of: jax.Array) -> jax.Array:
        return span_sums(which.astype(jnp.float32), of, count)

    size = tokens(inside, spans)
    complete = tokens(counted, spans) == size
    valid = (size > 0) & complete & (tokens(teacher_spans >= 0, teacher_spans) > 0)
    place = jnp.clip(spans, 0, count - 1)

    def of_token(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, place, axis=1)

    counted &= of_token(valid)
    rollout = student_log_probs if rollout_log_probs is None else rollout_log_probs
    student, rollout = _sampled(counted, student_log_probs, rollout)
    p, sampled = (span_sums(jax.lax.stop_gradient(a), spans, count) for a in (student, rollout))
    q = span_sums(jax.lax.stop_gradient(jnp.asarray(teacher_log_probs)), teacher_spans, count)
    q, p, sampled = _sampled(valid, q, p, sampled)
    advantages = discounted_sums(q - p, discount, valid)
    weights = importance_weights(p, sampled, importance_clip, beyond=beyond, where=valid)
    score = student - jax.lax.stop_gradient(student)  # 0, with the gradient of log p
    estimate = jnp.where(counted, of_token(weights) * -of_token(advantages), 0.0)
    return estimate * (1.0 / jnp.maximum(of_token(size), 1.0) + score)
