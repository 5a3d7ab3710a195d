"""Batches to learn from: demonstrations, or what the student itself wrote."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from opd_jax import losses, rollout, tasks
from opd_jax.parallel import batch_sharding
from opd_jax.training._objectives import token_weights
from opd_jax.training._setup import Setup
from opd_jax.training._step import Batch


def make_batch(
    setup: Setup, params: Any, step: int, key: jax.Array, on_progress: Callable[[int], None]
) -> tuple[Batch, dict[str, float]]:
    """The batch of `step` on the mesh, and what there is to say about it.

    Args:
        setup: the run.
        params: the student's, which samples (unused for sft).
        step: counts from 0; with the key it determines the batch.
        key: for sampling.
        on_progress: called while sampling.
    """
    prompts = setup.prompts[step]
    if setup.config.objective == "sft":
        batch, metrics = _demonstrations(prompts)
    else:
        batch, metrics = _rollouts(setup, params, prompts, key, on_progress)
    mask = np.asarray(batch.mask)
    weights = np.asarray(token_weights(mask, setup.config.objective))
    metrics |= {"tokens": int(mask.sum()), "completion_length": float(mask.sum(-1).mean())}
    return jax.device_put(batch._replace(weights=weights), batch_sharding(setup.mesh)), metrics


def _demonstrations(prompts: tasks.PromptBatch) -> tuple[Batch, dict[str, float]]:
    mask = np.arange(prompts.completions.shape[1]) < prompts.completion_lengths[:, None]
    return Batch(prompts.tokens, prompts.lengths, prompts.completions, mask), {}


def _rollouts(setup, params, prompts, key, on_progress) -> tuple[Batch, dict[str, float]]:
    config, n = setup.config, setup.config.samples_per_prompt
    sampled = rollout.generate(
        setup.model(params),
        np.repeat(prompts.tokens, n, axis=0),
        key,
        prompt_lengths=np.repeat(prompts.lengths, n),
        max_new_tokens=config.max_new_tokens,
        stop_token_ids=setup.stops,
        on_progress=on_progress,
    )
    finish, mask = np.asarray(sampled.finish), np.asarray(sampled.mask)
    metrics = {
        "truncation_rate": float(np.mean(finish == 0)),
        "eos_rate": float(np.mean(finish == 1)),
    }
    batch = Batch(
        sampled.prompts,
        sampled.prompt_lengths,
        sampled.completions,
        sampled.mask,
        rollout_log_probs=sampled.log_probs,
    )
    if prompts.context_tokens is not None:
        batch = batch._replace(
            teacher_prompts=np.repeat(prompts.context_tokens, n, axis=0),
            teacher_prompt_lengths=np.repeat(prompts.context_lengths, n),
        )
    if config.objective == "grpo":
        rewards = _rewards(setup, prompts, np.asarray(sampled.completions), mask)
        groups = rewards.reshape(-1, n)
        metrics["reward"] = float(rewards.mean())
        metrics["constant_groups"] = float(np.mean(groups.min(1) == groups.max(1)))
        advantages = np.asarray(losses.group_advantages(rewards, n))
        batch = batch._replace(advantages=np.where(mask, advantages[:, None], np.float32(0)))
    return batch, metrics


def _rewards(setup: Setup, prompts: tasks.PromptBatch, completions, mask) -> np.ndarray:
    """The verifier's opinion of each completion, [B] float32."""
    task, n = setup.prompts.task, setup.config.samples_per_prompt
    texts = tasks.decode(setup.tokenizer, [c[m] for c, m in zip(completions, mask, strict=True)])
    rewards = [task.verify(text, prompts.examples[i // n]) for i, text in enumerate(texts)]
    for text, reward in zip(texts, rewards, strict=True):
        if not np.isfinite(reward):
            raise ValueError(f"the verifier of {task.name!r} gave the reward {reward} to {text!r:.80}")
    return np.asarray(rewards, np.float32)
