"""What other models than the student say of a batch: teachers, a reference."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from opd_jax.config import Config
from opd_jax.parallel import to_host
from opd_jax.training._step import Batch, State, make_log_probs, make_measure, make_score
from opd_jax.training._teacher_mesh import ApartTeacher


class Scorer:
    """The compiled passes over a batch between its sampling and the update.

    Args:
        config: of the run.
        student: graph definition of the student.
        frozen: parameters of the student that are not trained, or None.
        teachers: models that the loss compares distributions with; empty with an averaged or cached teacher.
        aligned: a teacher of another tokenizer, or None.
        reference: the model that progress is measured from, or None.
        vocab_size: tokens that the distributions range over; None: those that student and teachers share.
        mesh: the student's, where the (only) teacher is on another one; or None.

    Attributes:
        vocab_size: as given.
        graphdefs: of the teachers, as `make_update` takes them.
        passes: whether there is anything to score.
        models: arrays of the models that do not change, as far as they are on the student's mesh.
        apart: the teacher, if it is on a mesh of its own; or None.
        measures: whether `measure` must be called before the update.
    """

    def __init__(
        self,
        config: Config,
        student: nnx.GraphDef,
        frozen: Any,
        teachers: Sequence[nnx.Module],
        *,
        aligned: nnx.Module | None = None,
        reference: nnx.Module | None = None,
        vocab_size: int | None = None,
        mesh: Mesh | None = None,
    ):
        self.vocab_size = vocab_size
        self._ema, self._frozen = config.teacher.ema is not None, frozen
        self._models = [nnx.state(teacher) for teacher in teachers]
        self.apart = None if mesh is None or not teachers else ApartTeacher(teachers[0], mesh)
        self._given = self._models if self.apart is None else [self.apart.head]
        self.graphdefs = [student] if self._ema else [nnx.graphdef(teacher) for teacher in teachers]
        dtype = jnp.dtype(config.student.dtype)
        size = dict(micro_batches=config.micro_batches)
        cast = dtype if self._ema else None
        self._scores = [make_score(graphdef, dtype=cast, **size) for graphdef in self.graphdefs]
        size |= dict(loss_chunk=config.loss_chunk)
        self._aligned, self._reference = aligned, reference
        self._log_probs = {
            name: make_log_probs(nnx.graphdef(model), **size, vocab_size=tokens)
            for name, model, tokens in (("aligned", aligned, None), ("reference", reference, vocab_size))
            if model is not None
        }
        others = (nnx.state(model) for model in (aligned, reference) if model is not None)
        self.models = [*self._given, *others]
        self.passes = bool(self.graphdefs or self._log_probs)
        self.measures = config.tokens.weights != "uniform" or config.early_stop.overlap > 0
        self._measure = make_measure(student, self.graphdefs, dtype=dtype, ema=self._ema, **size)

    def score(self, state: State, batch: Batch) -> tuple[Batch, tuple[Any, ...], tuple[jax.Array, ...]]:
        """The batch with others' log-probs, and what the update takes of the teachers: their parameters and
        hidden states."""
        if self._aligned is not None:
            judged = self._log_probs["aligned"](
                nnx.state(self._aligned),
                batch.teacher_prompts,
                batch.teacher_prompt_lengths,
                batch.teacher_completions,
            )
            batch = batch._replace(teacher_log_probs=judged)
        if self._reference is not None:
            rows = (batch.prompts, batch.prompt_lengths, batch.completions)
            judged = self._log_probs["reference"](nnx.state(self._reference), *rows)
            batch = batch._replace(reference_log_probs=judged)
        if self._ema:
            return batch, (), (self._scores[0](state.ema, batch, self._frozen),)
        if self.apart is not None:
            return batch, tuple(self._given), (self.apart.score(self._scores[0], batch),)
        present = None if batch.teacher_rows is None else set(to_host(batch.teacher_rows).tolist())
        hidden = []
        for i, (score, params) in enumerate(zip(self._scores, self._models, strict=True)):
            if present is None or i in present:
                hidden.append(score(params, batch))
            else:  # nobody in this batch learns from it
                shape = jax.eval_shape(score, params, batch)
                hidden.append(jnp.zeros(shape.shape, shape.dtype, device=batch.mask.sharding))
        return batch, tuple(self._given), tuple(hidden)

    def measure(
        self, state: State, teacher_params: tuple, batch: Batch, hidden: tuple
    ) -> dict[str, jax.Array]:
        """See `make_measure`."""
        teacher_params = (state.ema,) if self._ema else teacher_params
        return self._measure(state.params, teacher_params, batch, hidden, self._frozen)
