"""Batches to learn from: demonstrations, what a teacher wrote, or what the student itself wrote."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from opd_jax import losses, rollout, tasks
from opd_jax.parallel import batch_sharding, place, shared, to_host
from opd_jax.training._objectives import token_weights
from opd_jax.training._setup import Setup
from opd_jax.training._step import Batch

_REFILL = 2**20  # prompts of further rounds of sampling are those of steps that no run comes to
_SOURCE, _ROUND = 0, 1  # one key per purpose


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
    config, prompts = setup.config, setup.prompts[step]
    if not _on_policy(setup, key):
        if config.off_policy == "data":
            batch, metrics = _demonstrations(setup, prompts), {}
        else:
            drawn = _sample(setup, setup.teacher, prompts, jax.random.fold_in(key, _ROUND), on_progress)
            batch, metrics = drawn.batch._replace(rollout_log_probs=None), _ends(drawn.finish)
            if config.tokens.drop_truncated:
                batch = _without_truncated(batch, drawn.finish)
    elif config.objective == "grpo" or config.task_weight:
        batch, metrics = _rewarded(setup, params, step, key, on_progress)
    else:
        limit = _horizon(setup, step)
        drawn = _sample(setup, setup.model(params), prompts, key, on_progress, limit)
        batch, metrics = drawn.batch, _ends(drawn.finish)
        if config.tokens.drop_truncated and limit == config.max_new_tokens:
            batch = _without_truncated(batch, drawn.finish)
    if setup.retokenize is not None:
        batch = setup.retokenize(batch, prompts)
        metrics["aligned"] = float(np.mean(batch.spans[np.asarray(batch.mask)] >= 0))
    mask = np.asarray(batch.mask)
    weights = np.asarray(token_weights(mask, config))
    metrics |= {"tokens": int(mask.sum()), "completion_length": float(mask.sum(-1).mean())}
    return place(batch._replace(weights=weights), batch_sharding(setup.mesh)), metrics


def weigh(setup: Setup, batch: Batch, measured: dict[str, jax.Array]) -> tuple[Batch, dict[str, float]]:
    """Cuts completions and weighs tokens by what the two models say of them (`make_measure`)."""
    tokens, stop, metrics = setup.config.tokens, setup.config.early_stop, {}
    measured = to_host(measured)
    mask = whole = to_host(batch.mask)
    if stop.overlap:
        keep = losses.overlap_stop(measured["top16_overlap"], stop.window, stop.overlap, where=mask)
        mask = mask & (np.arange(mask.shape[1]) < np.asarray(keep)[:, None])
        metrics["cut_rate"] = float(np.mean(mask.sum(-1) < whole.sum(-1)))
    if tokens.weights == "high_entropy":
        mask = mask & np.asarray(losses.high_entropy(measured["student_entropy"], tokens.fraction, mask))
    weights = np.asarray(token_weights(mask, setup.config))
    if tokens.weights == "prefix_drift":
        advantages = measured["teacher_log_probs"] - measured["student_log_probs"]
        weights = weights * np.asarray(losses.prefix_drift_weights(advantages, tokens.strength, mask))
    metrics |= {"tokens": int(whole.sum()), "counted_tokens": int(mask.sum())}
    mask, weights = place((mask, weights), batch_sharding(setup.mesh))
    return batch._replace(mask=mask, weights=weights), metrics


def _on_policy(setup: Setup, key: jax.Array) -> bool:
    """Whether the student writes this step's completions; drawn for each step (GKD)."""
    if setup.config.objective == "sft":
        return False
    lmbda = setup.config.lmbda
    return lmbda == 1 or bool(jax.random.uniform(jax.random.fold_in(key, _SOURCE)) < lmbda)


def _horizon(setup: Setup, step: int) -> int:
    """Tokens that are sampled at most in this step."""
    stop, most = setup.config.early_stop, setup.config.max_new_tokens
    if not stop.horizon or step >= stop.horizon_steps:
        return most
    return stop.horizon + (most - stop.horizon) * step // stop.horizon_steps


def _demonstrations(setup: Setup, prompts: tasks.PromptBatch) -> Batch:
    mask = np.arange(prompts.completions.shape[1]) < prompts.completion_lengths[:, None]
    batch = Batch(prompts.tokens, prompts.lengths, prompts.completions, mask)
    batch = for_teachers(setup, batch, prompts)
    if setup.cache is not None:
        cached = setup.cache.lookup(prompts)
        batch = batch._replace(support=cached.support, support_log_probs=cached.categories)
    if setup.config.samples_per_prompt > 1:
        batch = jax.tree.map(lambda a: np.repeat(a, setup.config.samples_per_prompt, axis=0), batch)
    return batch


def for_teachers(setup: Setup, batch: Batch, prompts: tasks.PromptBatch) -> Batch:
    """Adds what only teachers see of the prompts (one row each)."""
    if prompts.context_tokens is not None:
        batch = batch._replace(
            teacher_prompts=prompts.context_tokens, teacher_prompt_lengths=prompts.context_lengths
        )
    if setup.teacher_of is not None:
        batch = batch._replace(teacher_rows=setup.teacher_of[prompts.ids])
    return batch


class _Drawn(NamedTuple):
    batch: Batch
    finish: np.ndarray  # [B], see rollout.Rollout


def _sample(setup, model, prompts, key, on_progress, limit: int | None = None) -> _Drawn:
    config, n = setup.config, setup.config.samples_per_prompt
    rows = for_teachers(setup, Batch(prompts.tokens, prompts.lengths, None, None), prompts)
    rows = jax.tree.map(lambda a: np.repeat(a, n, axis=0), rows)
    own = model is not setup.teacher or rows.teacher_prompts is None
    sampled = rollout.generate(
        model,
        rows.prompts if own else rows.teacher_prompts,
        key,
        prompt_lengths=rows.prompt_lengths if own else rows.teacher_prompt_lengths,
        max_new_tokens=config.max_new_tokens,
        limit=limit,
        stop_token_ids=setup.stops,
        on_progress=on_progress,
    )
    completions, mask, log_probs, finish = to_host(
        (sampled.completions, sampled.mask, sampled.log_probs, sampled.finish)
    )
    batch = rows._replace(completions=completions, mask=mask, rollout_log_probs=log_probs)
    return _Drawn(batch, finish)


def _ends(finish: np.ndarray) -> dict[str, float]:
    return {"truncation_rate": float(np.mean(finish == 0)), "eos_rate": float(np.mean(finish == 1))}


def _without_truncated(batch: Batch, finish: np.ndarray) -> Batch:
    return batch._replace(mask=np.asarray(losses.loss_mask(batch.mask, truncated=finish == 0)))


def _rewarded(setup, params, step, key, on_progress) -> tuple[Batch, dict[str, float]]:
    """Completions with the advantages of their rewards within each prompt's group.

    With dynamic sampling, groups whose rewards are all equal make room for the informative ones of further
    rounds, as long as there are rounds left (DAPO).
    """
    config, n, model = setup.config, setup.config.samples_per_prompt, setup.model(params)
    parts: list[tuple[Batch, np.ndarray, np.ndarray]] = []  # batch, rewards, finish: of kept groups
    metrics, count, limit = {}, 0, _horizon(setup, step)
    for turn in range(config.dynamic_sampling + 1):
        prompts = setup.prompts[step + turn * _REFILL]
        round_key = key if turn == 0 else jax.random.fold_in(jax.random.fold_in(key, _ROUND), turn)
        batch, finish = _sample(setup, model, prompts, round_key, on_progress, limit)
        correct = _rewards(setup, prompts, batch.completions, batch.mask)
        rewards = correct
        if config.overlong_buffer:
            penalty = losses.overlong_penalty(
                batch.mask.sum(-1), config.max_new_tokens, config.overlong_buffer
            )
            rewards = correct + np.asarray(penalty)
        informative = np.asarray(losses.informative_groups(correct, n))
        if turn == 0:
            metrics = {"reward": float(correct.mean()), "constant_groups": float(1 - informative.mean())}
            metrics |= _ends(finish)
            spare = (batch, rewards, finish, ~informative)
        chosen = np.ones_like(informative) if config.dynamic_sampling == 0 else informative
        parts.append(jax.tree.map(lambda a, rows=chosen: a[rows], (batch, rewards, finish)))
        count += int(chosen.sum())
        if count >= config.batch_size:
            break
    if config.dynamic_sampling:
        metrics["sampling_rounds"] = len(parts)
        parts.append(jax.tree.map(lambda a: a[spare[3]], spare[:3]))  # constant groups fill what is left
    batch, rewards, finish = jax.tree.map(lambda *a: np.concatenate(a)[: config.batch_size], *parts)
    advantages = np.asarray(losses.group_advantages(rewards, n, normalise=config.normalise_advantages))
    batch = batch._replace(advantages=np.where(batch.mask, advantages[:, None], np.float32(0)))
    if config.tokens.drop_truncated and limit == config.max_new_tokens:
        batch = _without_truncated(batch, finish)
    return batch, metrics


def _rewards(setup: Setup, prompts: tasks.PromptBatch, completions, mask) -> np.ndarray:
    """The verifier's opinion of each completion, [B] float32."""
    task, n = setup.prompts.task, setup.config.samples_per_prompt

    def verify(i: int) -> float:
        (text,) = tasks.decode(setup.tokenizer, [completions[i][mask[i]]])
        reward = task.verify(text, prompts.examples[i // n])
        if not np.isfinite(reward):
            raise ValueError(f"the verifier of {task.name!r} gave the reward {reward} to {text!r:.80}")
        return reward

    return shared(verify, len(completions))
