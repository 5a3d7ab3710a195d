"""The prompt pipeline: rendered once, then random access by step."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from opd_jax._extras import require
from opd_jax.rollout import bucket
from opd_jax.tasks._render import Chat, encode_completions, render_all
from opd_jax.tasks._task import Example, Task

_CHUNK = 1024  # examples rendered between two calls of `progress`


class PromptBatch(NamedTuple):
    """B prompts; token arrays are right padded.

    Attributes:
        examples: B examples, read when they are looked at.
        ids: [B] int64, their indices in the task.
        tokens: [B, P] int32.
        lengths: [B] int32.
        context_tokens: [B, Q] int32, the prompts that the teacher sees; None: the same as `tokens`.
        context_lengths: [B] int32 or None.
        completions: [B, N] int32, demonstrations with EOS (supervised training only), or None.
        completion_lengths: [B] int32 or None.
    """

    examples: Sequence[Example]
    ids: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    context_tokens: np.ndarray | None = None
    context_lengths: np.ndarray | None = None
    completions: np.ndarray | None = None
    completion_lengths: np.ndarray | None = None


class _Examples(Sequence):
    """Some of a task's examples; of many processes, each reads those that it verifies."""

    def __init__(self, task: Task, ids: np.ndarray):
        self._task, self._ids = task, ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, i):
        return _Examples(self._task, self._ids[i]) if isinstance(i, slice) else self._task[int(self._ids[i])]


class _Rows:
    """Token lists of many lengths, padded to the power of two that holds the longest."""

    def __init__(self, rows: Sequence[Sequence[int]], pad: int):
        self._rows = [np.asarray(row, np.int32) for row in rows]
        self._pad = pad
        self.longest = max(map(len, rows))
        self.bucket = bucket(self.longest)

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows as [B, bucket] int32, and their lengths [B] int32."""
        tokens = np.full((len(indices), self.bucket), self._pad, np.int32)
        lengths = np.zeros(len(indices), np.int32)
        for i, index in enumerate(indices):
            row = self._rows[index]
            tokens[i, : len(row)], lengths[i] = row, len(row)
        return tokens, lengths


class Prompts:
    """The prompts of a task as batches; `prompts[step]` is a function of the arguments and `step`.

    Everything is rendered up front, so what cannot be used shows before training starts. The order
    is shuffled anew in every epoch; an epoch ends within a batch where the sizes do not divide.

    Args:
        task: where the examples come from.
        tokenizer: a `transformers` tokenizer.
        batch_size: B, prompts a batch.
        max_prompt_length: in tokens; applies to what the student sees.
        too_long: "drop" leaves longer prompts (and demonstrations) out and counts them; "error"
            raises.
        chat: see `render`.
        seed: of the order.
        context_template: template of the prompt that only the teacher sees, see `render`.
        max_completion_length: in tokens, EOS included; if given, every example must have a
            demonstration (`completion`), which is then part of the batches.
        shuffle: False keeps the task's order.
        limit: use only the first `limit` examples of the task.
        progress: called now and then with (examples rendered, examples).

    Attributes:
        task, tokenizer, batch_size: as given.
        bucket: P, the power of two that holds the longest prompt.
        context_bucket, completion_bucket: likewise, or None.
        longest, context_longest: tokens of the longest prompt (and the longest teacher's prompt, or None).
        kept: [n] int64, indices of the usable examples; n is also `len(prompts)`.
        dropped: how many examples were too long.

    Raises:
        ValueError: naming the example that cannot be rendered, lacks a demonstration, is empty, or
            is too long under "error"; also if the task is empty or nothing is left.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        *,
        batch_size: int,
        max_prompt_length: int,
        too_long: Literal["drop", "error"] = "drop",
        chat: Chat = "auto",
        seed: int = 0,
        context_template: str | None = None,
        max_completion_length: int | None = None,
        shuffle: bool = True,
        limit: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        if too_long not in ("drop", "error"):
            raise ValueError(f"too_long must be 'drop' or 'error', not {too_long!r}")
        for name, value in (("batch_size", batch_size), ("max_prompt_length", max_prompt_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.task, self.tokenizer, self.batch_size = task, tokenizer, batch_size
        self._limits = {"prompt": max_prompt_length, "completion": max_completion_length}
        self._too_long = too_long
        columns = self._render(limit, chat, context_template, progress)
        pad = tokenizer.pad_token_id or 0
        self._prompts = _Rows(columns["prompt"], pad)
        self._contexts = _Rows(columns["context"], pad) if context_template is not None else None
        self._completions = _Rows(columns["completion"], pad) if max_completion_length is not None else None
        self.bucket, self.longest = self._prompts.bucket, self._prompts.longest
        self.context_longest = self._contexts and self._contexts.longest
        self.context_bucket = self._contexts and self._contexts.bucket
        self.completion_bucket = self._completions and self._completions.bucket
        self._order = self._pipeline(seed, shuffle)

    def _render(self, limit, chat, context_template, progress) -> dict[str, list[list[int]]]:
        """Renders all examples and keeps those that fit; sets `kept` and `dropped`."""
        total = len(self.task) if limit is None else min(limit, len(self.task))
        if total < 1:
            raise ValueError(f"the task {self.task.name!r} has no examples")
        columns: dict[str, list] = {"prompt": [], "context": [], "completion": []}
        kept = []
        for first in range(0, total, _CHUNK):
            examples = [self.task[i] for i in range(first, min(first + _CHUNK, total))]
            chunk = {"prompt": render_all(self.tokenizer, examples, chat=chat, first=first)}
            if context_template is not None:
                chunk["context"] = render_all(
                    self.tokenizer, examples, chat=chat, template=context_template, first=first
                )
            if self._limits["completion"] is not None:
                chunk["completion"] = self._demonstrations(examples, first)
            for offset in range(len(examples)):
                if self._fits(chunk, offset, first + offset):
                    kept.append(first + offset)
                    for name, rows in chunk.items():
                        columns[name].append(rows[offset])
            if progress is not None:
                progress(first + len(examples), total)
        self.kept = np.asarray(kept, np.int64)
        self.dropped = total - len(kept)
        if not kept:
            raise ValueError(
                f"none of the {total} examples of {self.task.name!r} fits: the prompt may have "
                f"{self._limits['prompt']} tokens, the completion {self._limits['completion']}"
            )
        return columns

    def _demonstrations(self, examples: list[Example], first: int) -> list[list[int]]:
        for index, example in enumerate(examples, first):
            if example.completion is None:
                raise ValueError(
                    f"example {index} of {self.task.name!r} has no completion, which supervised "
                    "training imitates"
                )
        return encode_completions(self.tokenizer, [e.completion for e in examples], first)

    def _fits(self, chunk: dict[str, list], offset: int, index: int) -> bool:
        for name, rows in chunk.items():
            length, limit = len(rows[offset]), self._limits.get(name)
            if length == 0:
                raise ValueError(f"the {name} of example {index} is empty")
            if limit is not None and length > limit:
                if self._too_long == "error":
                    raise ValueError(
                        f"the {name} of example {index} has {length} tokens, more than the limit "
                        f"of {limit} (raise max_{name}_length, or drop such examples with "
                        "too_long: drop)"
                    )
                return False
        return True

    def _pipeline(self, seed: int, shuffle: bool):
        order = require("grain").MapDataset.source(range(len(self.kept)))
        if shuffle:
            order = order.shuffle(seed=seed % 2**32)
        return order.repeat().batch(self.batch_size)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, step: int) -> PromptBatch:
        if step < 0:
            raise IndexError(f"step must not be negative, got {step}")
        return self.take(np.asarray(self._order[step]))

    def take(self, rows: Sequence[int] | np.ndarray) -> PromptBatch:
        """The batch of the given positions among the kept examples (0 <= row < len(self))."""
        rows = np.asarray(rows)
        ids = self.kept[rows]
        batch = PromptBatch(_Examples(self.task, ids), ids, *self._prompts.take(rows))
        if self._contexts is not None:
            tokens, lengths = self._contexts.take(rows)
            batch = batch._replace(context_tokens=tokens, context_lengths=lengths)
        if self._completions is not None:
            tokens, lengths = self._completions.take(rows)
            batch = batch._replace(completions=tokens, completion_lengths=lengths)
        return batch
