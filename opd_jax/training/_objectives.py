"""What is minimised, token by token, and what is reported about each token."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from opd_jax import losses
from opd_jax.config import Config

_TOP = 16


class Tokens(NamedTuple):
    """Completion tokens in their contexts; the teacher is the reference model under grpo.

    Attributes:
        ids: [B, N] int32.
        mask: [B, N] bool, 1 = counts.
        student: log-probs of every next token, [B, N, V] float32.
        teacher: the same, or None.
        rollout_log_probs: [B, N] float32 of the sampled tokens when they were sampled, or None.
        advantages: [B, N] float32, or None.
    """

    ids: jax.Array
    mask: jax.Array
    student: jax.Array
    teacher: jax.Array | None
    rollout_log_probs: jax.Array | None
    advantages: jax.Array | None

    def log_probs(self, distribution: jax.Array) -> jax.Array:
        """Those of the tokens themselves, [B, N, V] -> [B, N]."""
        return jnp.take_along_axis(distribution, self.ids[..., None], axis=-1)[..., 0]


Objective = Callable[[Tokens], jax.Array]
"""Per-token loss [B, N] float32; 0 where the mask is 0, whatever stands there."""


def make_objective(config: Config) -> Objective:
    """The objective that a validated config asks for."""
    if config.objective == "sft":
        return _cross_entropy
    if config.objective == "grpo":

        def grpo(tokens: Tokens) -> jax.Array:
            loss = losses.clipped_policy_gradient(
                tokens.log_probs(tokens.student),
                tokens.rollout_log_probs,
                tokens.advantages,
                clip=config.ratio_clip,
                where=tokens.mask,
            )
            if tokens.teacher is None:
                return loss
            # The exact divergence: the usual k3 estimate has the gradient of the forward one.
            return loss + config.kl_coefficient * _reverse_kl(tokens)

        return grpo
    if config.loss == "sampled_reverse_kl":
        return lambda tokens: losses.sampled_reverse_kl(
            tokens.log_probs(tokens.student),
            tokens.log_probs(tokens.teacher),
            tokens.rollout_log_probs,
            importance_clip=config.importance_clip,
            where=tokens.mask,
        )
    return _reverse_kl


def _reverse_kl(tokens: Tokens) -> jax.Array:
    return losses.reverse_kl(tokens.student, tokens.teacher, where=tokens.mask[..., None])


def _cross_entropy(tokens: Tokens) -> jax.Array:
    return -jnp.where(tokens.mask, tokens.log_probs(tokens.student), 0.0)


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


def token_weights(mask: jax.Array, objective: str) -> jax.Array:
    """Weight of each token's loss, [B, N]: the mean over the tokens of the whole batch, or, for grpo, over
    each completion's tokens and then over completions. From the whole batch, so that no split of it into
    micro-batches or devices changes the loss."""
    mask = mask.astype(jnp.float32)
    if objective == "grpo":
        return mask / jnp.maximum(mask.sum(-1, keepdims=True), 1.0) / mask.shape[0]
    return mask / jnp.maximum(mask.sum(), 1.0)
