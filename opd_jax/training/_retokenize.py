"""Completions in the tokens of a teacher that has another tokenizer."""

from typing import Any

import numpy as np

from opd_jax import models, tasks
from opd_jax.config import Config
from opd_jax.rollout import bucket
from opd_jax.training._step import Batch


class Retokenize:
    """Adds to a batch what a teacher with another tokenizer reads.

    Args:
        config: of the run.
        tokenizer: the student's.
        stops: ids that end the student's completions.
        prompts: the training prompts.

    Raises:
        ValueError: if a tokenizer does not say which bytes its tokens stand for, or a prompt is too long for
            the teacher.
    """

    def __init__(self, config: Config, tokenizer: Any, stops: tuple[int, ...], prompts: tasks.Prompts):
        path = config.teacher.path
        self._mine, self._stops = tokenizer, stops
        self._theirs = models.load_tokenizer(path)
        self._stop = models.stop_token_ids(path, self._theirs)[0]
        for each in (self._mine, self._theirs):
            tasks.token_bytes(each, [])
        self._kept = prompts.kept
        self._prompts = tasks.Prompts(
            tasks.Subset(prompts.task, prompts.kept),
            self._theirs,
            batch_size=1,
            max_prompt_length=2**30,
            chat=config.data.chat,
            context_template=config.teacher.context,
            shuffle=False,
        )
        longest, limit = (
            self._prompts.context_longest or self._prompts.longest,
            models.load_config(path).max_length,
        )
        # Each width compiles its own pass. It follows from the batch alone: a resumed run has no other sums.
        self._least, self._most = bucket(config.max_new_tokens), limit - longest
        if longest + config.max_new_tokens > limit:
            raise ValueError(
                f"the longest prompt has {longest} of the teacher's tokens and max_new_tokens is "
                f"{config.max_new_tokens}, together more than the {limit} positions of the teacher {path}"
            )

    def __call__(self, batch: Batch, prompts: tasks.PromptBatch) -> Batch:
        """The batch with the teacher's prompts, its tokens of the completions, and the spans they share."""
        rows, mask = len(batch.completions), np.asarray(batch.mask)
        ids = np.searchsorted(self._kept, prompts.ids)
        theirs = self._prompts.take(np.repeat(ids, rows // len(prompts.ids)))
        own = theirs.context_tokens is None
        lengths, completions = mask.sum(-1), np.asarray(batch.completions)
        options = dict(lengths=lengths, stops=self._stops, teacher_stop=self._stop)
        found = tasks.retokenize(self._theirs, self._mine, completions, **options)
        width = min(max(self._least, found.teacher_ids.shape[1]), self._most)
        if width < found.teacher_ids.shape[1]:  # what the teacher has no positions for is in no span
            found = tasks.retokenize(self._theirs, self._mine, completions, width=width, **options)
        beyond = ((0, 0), (0, width - found.teacher_ids.shape[1]))
        return batch._replace(
            teacher_prompts=theirs.tokens if own else theirs.context_tokens,
            teacher_prompt_lengths=theirs.lengths if own else theirs.context_lengths,
            teacher_completions=np.pad(found.teacher_ids, beyond),
            teacher_spans=np.pad(found.teacher_spans, beyond, constant_values=-1),
            spans=found.student_spans,
        )
