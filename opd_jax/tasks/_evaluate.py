"""Sampled accuracy on held-out prompts, with standard errors."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from opd_jax import parallel, rollout
from opd_jax.rollout import Sampling
from opd_jax.tasks._prompts import Prompts
from opd_jax.tasks._render import decode
from opd_jax.tasks._task import Example


class Record(NamedTuple):
    """One completion and its reward."""

    prompt: str  # what the model saw, special tokens included
    completion: str  # without special tokens
    reward: float
    example: Example
    length: int  # tokens, the end-of-sequence token included
    finish: str  # "eos", "stop" or "length"


class Evaluation(NamedTuple):
    """What `evaluate` measured on n prompts, with `samples` completions of each.

    Attributes:
        accuracy: mean reward.
        standard_error: of `accuracy`, over prompts: the samples of a prompt are not independent
            evidence about other prompts. NaN for a single prompt.
        pass_at_k: k -> (probability that at least one of k completions has reward 1, its standard
            error over prompts).
        mean_length: tokens a completion, the end-of-sequence token included.
        truncated: fraction of completions that reached max_new_tokens.
        records: n * samples `Record`s, the samples of a prompt next to each other.
    """

    accuracy: float
    standard_error: float
    pass_at_k: dict[int, tuple[float, float]]
    mean_length: float
    truncated: float
    records: list[Record]


def pass_at_k(samples: int, correct: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the probability that at least one of k samples is correct.

    1 - C(n - c, k) / C(n, k) for c correct out of n samples.

    Args:
        samples: n.
        correct: [prompts] integers, c.
        k: 1 <= k <= n.

    Returns:
        [prompts] float64.

    Example:
        >>> pass_at_k(4, np.array([0, 1, 4]), 2).tolist()
        [0.0, 0.5, 1.0]

    References:
        Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv:2107.03374.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= samples, and samples is {samples}")
    total = math.comb(samples, k)
    return np.array([1 - math.comb(samples - int(c), k) / total for c in correct])


def evaluate(
    model: Any,
    prompts: Prompts,
    *,
    key: jax.Array,
    max_new_tokens: int,
    samples: int = 1,
    batch_size: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop_token_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    pass_k: Sequence[int] = (1,),
    context: bool = False,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> Evaluation:
    """Samples completions of every prompt and verifies them.

    The completion s of example i depends on the model, `key` and i * samples + s alone, not on the
    batch size. All batches have one shape: one compilation.

    Args:
        model: the model to sample from, see `rollout.generate`.
        prompts: the prompts, their tokenizer and their task, whose `verify` gives the rewards; their
            order and shuffling are no matter.
        key: a PRNG key.
        max_new_tokens: in tokens, a completion.
        samples: completions of each prompt.
        batch_size: completions sampled at once; None: `prompts.batch_size`.
        sampling: the law that tokens are drawn from; a temperature of 0 with more than one sample
            samples the same again.
        stop_token_ids: None: the tokenizer's EOS.
        stop_strings: see `rollout.generate`.
        pass_k: the k of pass@k, each at most `samples`.
        context: show the model what the teacher sees (`context_template` of the prompts).
        on_progress: called now and then with (completions done, completions, mean reward so far).

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: on a k above `samples`, sizes below 1, `context` without a template, no stop
            token, or a verifier's reward that is not within [0, 1].
    """
    batch_size = prompts.batch_size if batch_size is None else batch_size
    _check(prompts, samples, batch_size, pass_k, context)
    tokenizer = prompts.tokenizer
    if stop_token_ids is None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token: give stop_token_ids")
        stop_token_ids = (tokenizer.eos_token_id,)
    total = len(prompts) * samples
    records: list[Record] = []
    rewards = np.zeros(total)
    for first in range(0, total, batch_size):
        # The last batch is filled up by repetition, and what is too much is thrown away.
        jobs = np.minimum(np.arange(first, first + batch_size), total - 1)
        batch = prompts.take(jobs // samples)
        tokens, lengths = batch.tokens, batch.lengths
        if context:
            tokens, lengths = batch.context_tokens, batch.context_lengths
        so_far = (first, total, float(rewards[:first].mean()) if first else math.nan)
        result = rollout.generate(
            model,
            tokens,
            key,
            prompt_lengths=lengths,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_token_ids=stop_token_ids,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            row_ids=batch.ids * samples + jobs % samples,
            on_progress=None if on_progress is None else functools.partial(_tell, on_progress, so_far),
        )
        real = min(batch_size, total - first)
        records += _verify(prompts, batch.examples[:real], tokens, lengths, result)
        rewards[first : first + real] = [record.reward for record in records[first:]]
        if on_progress is not None:
            on_progress(len(records), total, float(rewards[: len(records)].mean()))
    return _summary(rewards.reshape(-1, samples), records, pass_k)


def _tell(on_progress: Callable[..., None], so_far: tuple, _tokens: int) -> None:
    on_progress(*so_far)


def _check(prompts: Prompts, samples, batch_size, pass_k, context) -> None:
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    for k in pass_k:
        pass_at_k(samples, np.zeros(0), k)
    if context and prompts.context_bucket is None:
        raise ValueError("context=True needs prompts with a context_template")


def _verify(prompts: Prompts, examples, tokens, lengths, result) -> list[Record]:
    """Records of the first len(examples) rows."""
    completions, counts = parallel.to_host((result.completions, result.lengths))
    finish = result.finish_reasons
    rows = range(len(examples))
    texts = decode(prompts.tokenizer, [completions[i, : counts[i]] for i in rows])

    def verify(i: int) -> float:
        reward = float(prompts.task.verify(texts[i], examples[i]))
        if not 0 <= reward <= 1:  # NaN too
            raise ValueError(
                f"the verifier of {prompts.task.name!r} gave the reward {reward}, which is not "
                f"within [0, 1], to {texts[i]!r:.80}"
            )
        return reward

    rewards, records = parallel.shared(verify, len(rows)), []
    for i, example, text in zip(rows, examples, texts, strict=True):
        reward = float(rewards[i])
        prompt = prompts.tokenizer.decode(tokens[i, : lengths[i]].tolist())
        records.append(Record(prompt, text, reward, example, int(counts[i]), finish[i]))
    return records


def _summary(rewards: np.ndarray, records: list[Record], pass_k: Sequence[int]) -> Evaluation:
    """`rewards` is [prompts, samples]."""
    correct = (rewards >= 1).sum(1)
    accuracy, standard_error = _mean(rewards.mean(1))
    return Evaluation(
        accuracy=accuracy,
        standard_error=standard_error,
        pass_at_k={k: _mean(pass_at_k(rewards.shape[1], correct, k)) for k in pass_k},
        mean_length=float(np.mean([record.length for record in records])),
        truncated=float(np.mean([record.finish == "length" for record in records])),
        records=records,
    )


def _mean(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error."""
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
