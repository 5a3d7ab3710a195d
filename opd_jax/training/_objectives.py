"""What is minimised, and what is reported about each token.

An objective is a sum of terms. Some need the whole distribution at one token and nothing else: they are
computed where the logits are, a chunk of tokens at a time. The others need the sampled tokens' log-probs of
whole completions.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp

from opd_jax import losses
from opd_jax._objective_checks import SAMPLED
from opd_jax.config import Config, Loss

_TOP = 16
DIVERGENCES = {name: getattr(losses, name) for name in get_args(Loss) if name not in SAMPLED}


class Tokens(NamedTuple):
    """Completion tokens in their contexts; the teacher is the reference model under grpo.

    Attributes:
        ids: [B, N] int32.
        mask: [B, N] bool, 1 = counts.
        student: log-probs of every next token, [B, N, V] float32.
        teacher: the same, or None.
        rollout_log_probs: [B, N] float32 of the sampled tokens when they were sampled, or None.
        support: [B, N, K] int32, the tokens that a cached teacher knows, or None.
        support_log_probs: [B, N, K + 1] float32, the teacher's on them and on all others together.
    """

    ids: jax.Array
    mask: jax.Array
    student: jax.Array
    teacher: jax.Array | None = None
    rollout_log_probs: jax.Array | None = None
    support: jax.Array | None = None
    support_log_probs: jax.Array | None = None

    def log_probs(self, distribution: jax.Array) -> jax.Array:
        """Those of the tokens themselves, [B, N, V] -> [B, N]."""
        return jnp.take_along_axis(distribution, self.ids[..., None], axis=-1)[..., 0]


class Completions(NamedTuple):
    """Log-probs of the sampled tokens of whole completions, float32; what there is not is None.

    Attributes:
        mask: [B, N] bool, 1 = counts.
        student: [B, N], the only one that is differentiated.
        teacher: [B, N]; [B, M] of its own tokens where it has another tokenizer.
        rollout: [B, N], when they were sampled.
        reference: [B, N].
        advantages: [B, N], of the task's reward.
        spans: [B, N] int32, -1 = none: which piece of text a token belongs to (another tokenizer).
        teacher_spans: [B, M] int32.
    """

    mask: jax.Array
    student: jax.Array
    teacher: jax.Array | None = None
    rollout: jax.Array | None = None
    reference: jax.Array | None = None
    advantages: jax.Array | None = None
    spans: jax.Array | None = None
    teacher_spans: jax.Array | None = None


class Term(NamedTuple):
    """One summand of an objective.

    Attributes:
        name: under which it is logged, if there are several.
        loss: per-token loss [B, N] float32 of `Tokens` or of `Completions`; 0 where the mask is 0.
        whole: whether it takes `Completions`.
    """

    name: str
    loss: Callable[[Tokens], jax.Array] | Callable[[Completions], jax.Array]
    whole: bool = False


Objective = tuple[Term, ...]


def make_objective(config: Config) -> Objective:
    """The objective that a validated config asks for."""
    if config.objective == "sft":
        return (Term("cross_entropy", _cross_entropy),)
    if config.objective == "grpo":
        terms = (Term("task", partial(_clipped, clip=config.ratio_clip), whole=True),)
        if config.kl_coefficient:
            # The exact divergence: the usual k3 estimate has the gradient of the forward one.
            terms += (Term("kl", lambda tokens: config.kl_coefficient * _reverse_kl(tokens)),)
        return terms
    terms = (_distillation(config),)
    if config.task_weight:
        terms += (
            Term("task", partial(_task, weight=config.task_weight, bound=config.importance_clip), True),
        )
    return terms


def _distillation(config: Config) -> Term:
    name, options = config.loss or "reverse_kl", config.loss_options
    if name in DIVERGENCES:
        divergence = partial(DIVERGENCES[name], **options)
        if config.teacher.cache:
            return Term("distillation", partial(_cached, divergence=divergence))
        if config.loss_top_k:
            divergence = partial(losses.top_k, divergence, k=config.loss_top_k, support=config.loss_support)
            return Term("distillation", partial(_top_k, divergence=divergence))
        return Term("distillation", partial(_full, divergence=divergence))
    options = dict(options, importance_clip=config.importance_clip)
    if name == "sampled_tail_reverse_kl":
        options |= dict(k=config.loss_top_k, support=config.loss_support)
        return Term("distillation", partial(_sampled_tail, options=options))
    if name == "extrapolated_reverse_kl":
        return Term("distillation", partial(_extrapolated, **options), whole=True)
    if config.teacher.align:
        return Term("distillation", partial(_spans, options=options), whole=True)
    return Term("distillation", partial(_sampled, options=options), whole=True)


def _cross_entropy(tokens: Tokens) -> jax.Array:
    return -jnp.where(tokens.mask, tokens.log_probs(tokens.student), 0.0)


def _full(tokens: Tokens, divergence: Callable) -> jax.Array:
    return divergence(tokens.student, tokens.teacher, where=tokens.mask[..., None])


_reverse_kl = partial(_full, divergence=losses.reverse_kl)


def _top_k(tokens: Tokens, divergence: Callable) -> jax.Array:
    return jnp.where(tokens.mask, divergence(tokens.student, tokens.teacher), 0.0)


def _cached(tokens: Tokens, divergence: Callable) -> jax.Array:
    support = losses.Support(tokens.support, jnp.ones(tokens.support.shape, bool))
    student = losses.coarsen(tokens.student, support)
    return divergence(student, tokens.support_log_probs, where=tokens.mask[..., None])


def _sampled_tail(tokens: Tokens, options: dict) -> jax.Array:
    return losses.sampled_tail_reverse_kl(
        tokens.student,
        tokens.teacher,
        tokens.ids,
        rollout_log_probs=tokens.rollout_log_probs,
        where=tokens.mask,
        **options,
    )


def _sampled(batch: Completions, options: dict) -> jax.Array:
    return losses.sampled_reverse_kl(batch.student, batch.teacher, batch.rollout, where=batch.mask, **options)


def _spans(batch: Completions, options: dict) -> jax.Array:
    return losses.span_reverse_kl(
        batch.student,
        batch.spans,
        batch.teacher,
        batch.teacher_spans,
        batch.rollout,
        where=batch.mask,
        **options,
    )


def _extrapolated(batch: Completions, importance_clip: float, scale: float = 1.25) -> jax.Array:
    advantages = losses.extrapolated_advantages(
        batch.student, batch.teacher, batch.reference, scale, where=batch.mask
    )
    return losses.policy_gradient(batch.student, batch.rollout, advantages, importance_clip, where=batch.mask)


def _task(batch: Completions, weight: float, bound: float) -> jax.Array:
    return losses.policy_gradient(
        batch.student, batch.rollout, weight * batch.advantages, bound, where=batch.mask
    )


def _clipped(batch: Completions, clip: tuple[float, float]) -> jax.Array:
    return losses.clipped_policy_gradient(
        batch.student, batch.rollout, batch.advantages, clip=clip, where=batch.mask
    )


def statistics(tokens: Tokens, weight_bounds: tuple[float, float]) -> dict[str, jax.Array]:
    """Diagnostics of each token, [B, N] float32.

    `top16_overlap` is the share of the student's 16 most likely tokens that are among the teacher's 16;
    `top16_mass` is the student's probability on those shared tokens; `sampler_difference` is
    |log p_trainer - log p_sampler| of the sampled token, which one numerics path keeps near 0;
    `clip_rate` is the share of tokens whose importance weight is outside `weight_bounds`.
    """
    stats = {"student_entropy": losses.entropy(tokens.student)}
    if tokens.teacher is not None:
        top = min(_TOP, tokens.student.shape[-1])
        mine, mine_ids = jax.lax.top_k(tokens.student, top)
        _, their_ids = jax.lax.top_k(tokens.teacher, top)
        shared = (mine_ids[..., :, None] == their_ids[..., None, :]).any(-1)
        stats["kl"] = losses.reverse_kl(tokens.student, tokens.teacher)
        stats["teacher_entropy"] = losses.entropy(tokens.teacher)
        stats["top16_overlap"] = shared.mean(-1)
        stats["top16_mass"] = jnp.sum(jnp.exp(mine) * shared, axis=-1)
    if tokens.rollout_log_probs is not None:
        difference = tokens.log_probs(tokens.student) - tokens.rollout_log_probs
        stats["sampler_difference"] = jnp.abs(difference)
        weight = jnp.exp(difference)
        low, high = weight_bounds
        stats["clip_rate"] = ((weight < low) | (weight > high)).astype(jnp.float32)
    return stats


def weight_bounds(config: Config) -> tuple[float, float]:
    """Importance weights beyond these are clipped by the objective."""
    if config.objective == "grpo":
        low, high = config.ratio_clip
        return 1.0 - low, 1.0 + high
    return 0.0, config.importance_clip


def token_weights(mask: jax.Array, config: Config) -> jax.Array:
    """Weight of each token's loss, [B, N], from the whole batch, so that no split of it into micro-batches or
    devices changes the loss: by default the mean over tokens, for grpo over tokens and then completions."""
    how = config.aggregation or ("sequence" if config.objective == "grpo" else "token")
    limit = config.max_new_tokens if how == "constant" else None
    return losses.aggregation_weights(mask, how, max_length=limit, sequences=mask.shape[0])
