"""EffOPD in the loop: after some steps, the search along the way that training has come."""

import functools
import io
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import rollout, tasks
from opd_jax.parallel import batch_sharding, is_first, of_first, place, row_shards, to_host, together
from opd_jax.training._batches import for_teachers
from opd_jax.training._run import RunFolder, write_atomic
from opd_jax.training._setup import Setup
from opd_jax.training._step import Batch, State, make_measure, make_score
from opd_jax.transforms import block_matrices, extrapolation

_FILE = "score_rollouts.npz"


class Extrapolation:
    """Searches along W - anchor, and keeps the account of what it costs.

    What the KL is measured on, rollouts of the untrained student, is sampled once and kept in the run folder.

    Args:
        setup: the run.
        folder: of the run.
        params: the student's at the start; used if the rollouts are not in the folder yet.
        key: for the rollouts, or for sampling answers: the same at every search, so that what differs
            between two scores is the parameters.
        check_stop: called now and then; may raise.
    """

    def __init__(
        self, setup: Setup, folder: RunFolder, params: Any, key: jax.Array, check_stop: Callable[[], None]
    ):
        self._setup, self._key, self._check_stop = setup, key, check_stop
        self._config = config = setup.config.foresight.extrapolate
        self._prompts = _subset(setup, config.prompts)
        self._batch = None
        self.tokens = 0  # sampled or scored by searches of this process; the fixed rollouts are not counted
        if config.score == "kl" or config.max_kl is not None:
            self._batch = self._fixed_rollouts(folder, params)
        if config.score == "kl":
            _, self._teachers, self._hidden = setup.scorer.score(State(None, None), self._batch)
        if config.max_kl is not None:
            sizes = dict(micro_batches=setup.config.micro_batches)
            dtype = jnp.dtype(setup.config.student.dtype)
            self._own_score = make_score(setup.graphdef, dtype=dtype, **sizes)
            sizes |= dict(loss_chunk=setup.config.loss_chunk, dtype=dtype, ema=True)
            self._own_measure = make_measure(setup.graphdef, [setup.graphdef], **sizes)

    def due(self, step: int) -> bool:
        """Whether to search after so many updates."""
        kind = self._config.schedule
        schedule = kind if kind == "powers_of_two" else getattr(self._config, kind)  # every, or steps
        return extrapolation.is_checkpoint(step, schedule)

    def search(self, state: State) -> tuple[State, dict[str, float]]:
        """The state to go on from, and what there is to say about the search."""
        config, start, before = self._config, time.perf_counter(), self.tokens
        found = extrapolation.search(
            self._kl_score if config.score == "kl" else self._accuracy,
            state.params,
            state.anchor,
            factors=config.factors,
            rule=config.rule,
            margin=config.margin,
            matrices=block_matrices if config.moves == "blocks" else _everything,
            max_kl=config.max_kl,
            divergence=None if config.max_kl is None else self._divergence,
        )
        anchor = found.params if config.anchor == "accepted" else state.params
        state = state._replace(params=found.params, anchor=_copy(anchor))
        if found.accepted and config.reset_moments:
            state = state._replace(opt_state=_zeros(state.opt_state))
        return state, {
            "extrapolate_factor": found.factor,
            "extrapolate_start": found.scores[0],
            "extrapolate_score": found.scores[found.accepted],
            "extrapolate_evaluated": float(found.evaluated),
            "extrapolate_failed": float(found.failed),
            "extrapolate_tokens": float(self.tokens - before),
            "extrapolate_seconds": time.perf_counter() - start,
        }

    def _fixed_rollouts(self, folder: RunFolder, params: Any) -> Batch:
        """Rollouts of the prompts, and rows that do not count up to what spreads over mesh and micro-batches:
        a run may go on with other sizes of both."""
        path, count = folder.path / _FILE, len(self._prompts)
        if not of_first(path.exists()):
            prompts = self._prompts.take(_repeated(count, _shards(self._setup)))
            sampled = rollout.generate(
                self._setup.model(params),
                prompts.tokens,
                self._key,
                prompt_lengths=prompts.lengths,
                max_new_tokens=self._setup.config.max_new_tokens,
                stop_token_ids=self._setup.stops,
                on_progress=lambda _: self._check_stop(),
            )
            completions, mask, data = *to_host((sampled.completions, sampled.mask)), io.BytesIO()
            np.savez(data, completions=completions[:count], mask=mask[:count])
            together(lambda: write_atomic(path, data.getvalue()) if is_first() else None)
        rows = _repeated(count, self._setup.config.micro_batches * _shards(self._setup))
        prompts = self._prompts.take(rows)
        with np.load(path, allow_pickle=False) as saved:
            mask = saved["mask"][rows] & (np.arange(len(rows)) < count)[:, None]
            batch = Batch(prompts.tokens, prompts.lengths, saved["completions"][rows], mask)
        # The prompts' own ids are places in the subset.
        batch = for_teachers(self._setup, batch, prompts._replace(ids=self._prompts.task.ids[prompts.ids]))
        return place(batch, batch_sharding(self._setup.mesh))

    def _kl_score(self, params: Any) -> np.ndarray:
        """-KL(student || teacher) of each rollout, such that their mean is the mean over tokens."""
        self._check_stop()
        state = State(params, None)
        kl = self._setup.scorer.measure(state, self._teachers, self._batch, self._hidden)["kl"]
        kl, mask = to_host((kl, self._batch.mask))
        self.tokens += int(mask.sum())
        count = len(self._prompts)  # what fills up the rows has no say
        return -np.where(mask, kl, 0).sum(-1)[:count] * count / max(mask.sum(), 1)

    def _accuracy(self, params: Any) -> np.ndarray:
        """The verifier's opinion of one sampled answer to each prompt."""
        config = self._setup.config
        result = tasks.evaluate(
            self._setup.model(params),
            self._prompts,
            key=self._key,
            max_new_tokens=config.max_new_tokens,
            stop_token_ids=self._setup.stops,
            on_progress=lambda *_: self._check_stop(),
        )
        self.tokens += sum(record.length for record in result.records)
        return np.array([record.reward for record in result.records], np.float32)

    def _divergence(self, params: Any, candidate: Any) -> float:
        """Mean KL(candidate || params) on the fixed rollouts, nats a token."""
        hidden, frozen = self._own_score(params, self._batch, self._setup.frozen), self._setup.frozen
        kl = self._own_measure(candidate, (params,), self._batch, (hidden,), frozen)["kl"]
        kl, mask = to_host((kl, self._batch.mask))
        self.tokens += 2 * int(mask.sum())
        return float(np.where(mask, kl, 0).sum() / max(mask.sum(), 1))


def _subset(setup: Setup, count: int) -> tasks.Prompts:
    """Training prompts drawn by the run's seed."""
    config, prompts = setup.config, setup.prompts
    rng = np.random.default_rng(config.seed)
    ids = rng.choice(prompts.kept, count, replace=count > len(prompts.kept))
    return tasks.Prompts(
        tasks.Subset(prompts.task, ids),
        setup.tokenizer,
        batch_size=-(-count // _shards(setup)) * _shards(setup),
        max_prompt_length=config.data.max_prompt_length,
        chat=config.data.chat,
        context_template=config.teacher.context,
        shuffle=False,
    )


def _shards(setup: Setup) -> int:
    """Devices that rows are spread over, the student's as well as the teacher's."""
    apart = setup.scorer.apart
    meshes = [setup.mesh] if apart is None else [setup.mesh, apart.mesh]
    return math.lcm(*map(row_shards, meshes))


def _repeated(count: int, unit: int) -> np.ndarray:
    """0 ... count - 1, and the last again up to a multiple of `unit`."""
    return np.minimum(np.arange(-(-count // unit) * unit), count - 1)


def _everything(params: Any) -> Any:
    return jax.tree.map(lambda _: True, params)


@jax.jit
def _copy(tree: Any) -> Any:
    """The parameters are donated to the next update: what is kept must be arrays of its own."""
    return jax.tree.map(jnp.copy, tree)


@functools.partial(jax.jit, donate_argnums=0)
def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)
