"""The loop: the only place with state, files and clocks."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from opd_jax import models, parallel, tasks
from opd_jax.config import Config
from opd_jax.rollout import Sampling
from opd_jax.training._batches import make_batch, weigh
from opd_jax.training._checkpoint import Checkpoints
from opd_jax.training._compile_cache import compile_cache
from opd_jax.training._errors import CheckpointError, Interrupted, TrainingError
from opd_jax.training._extrapolation import Extrapolation
from opd_jax.training._foresight import dynamics, freeze_modules
from opd_jax.training._logging import Display, Loggers, require_loggers
from opd_jax.training._memory import memory_table
from opd_jax.training._process import Clock, on_signal
from opd_jax.training._result import Result
from opd_jax.training._run import COMPILE_CACHE, RunFolder, open_folder
from opd_jax.training._setup import Setup, prepare, still
from opd_jax.training._step import Batch, State

_ROLLOUT, _EVALUATION, _SEARCH = 0, 1, 2  # one key per purpose


def train(config: Config) -> Result:
    """Runs a config from its last checkpoint, or from the start, to its end.

    Args:
        config: see `opd_jax.config`; `run_dir` must be set.

    Returns:
        A `Result`.

    Raises:
        ValueError: if the config, the data or the models do not fit together.
        Interrupted: after Ctrl-C or SIGTERM; the same call goes on where it stopped.
        TrainingError: if too many steps in a row were not finite, the last checkpoint could not be
            written or none could be read, or another process is using the folder.
    """
    parallel.together(config.validate)
    with (
        open_folder(config) as folder,
        compile_cache(folder.path / COMPILE_CACHE),
        Display(config.steps, quiet=not parallel.is_first()) as display,
    ):
        for notice in folder.notices:
            display.print(notice)
        require_loggers(config)
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
        try:
            if not checkpoints.steps and folder.model.exists():  # in this order: all ask for the steps
                raise ValueError(
                    f"{folder.path} holds a finished run whose checkpoints are gone: there is nothing to "
                    "go on from; name another run_dir"
                )
            setup, state = prepare(config, display)
            step, record = 0, {}
            if checkpoints.steps:
                like = jax.tree.map(
                    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
                )
                del state  # there is not always room for two
                step, state, record = checkpoints.restore(
                    lambda record: still(setup, like, record["frozen"])[1] if record["frozen"] else like
                )
                if record["frozen"]:
                    setup, _ = still(setup, like, record["frozen"])
                display.print(f"resuming {folder.path} at step {step}")
            display.print(memory_table(setup, state))
            with jax.set_mesh(setup.mesh):  # activations, caches and kernels are laid out on it
                run = _Run(setup, state, step, _Record(**record), folder, checkpoints, display)
                del state
                return run.run()
        finally:
            checkpoints.close()


@dataclasses.dataclass
class _Record:
    """What a checkpoint holds besides arrays and its step."""

    evaluated: int = -1
    searched: int = 0
    seconds: float = 0.0
    tokens: int = 0
    search_seconds: float = 0.0
    search_tokens: int = 0
    accepted: int = 0
    reached: tuple[int, int] | None = None
    frozen: list[str] = dataclasses.field(default_factory=list)
    before: dict[str, float] = dataclasses.field(default_factory=dict)
    after: dict[str, float] = dataclasses.field(default_factory=dict)
    teacher: dict[str, float] = dataclasses.field(default_factory=dict)


class _Run:
    """A run in progress: its state, and where it is written down."""

    def __init__(
        self,
        setup: Setup,
        state: State,
        step: int,
        record: _Record,
        folder: RunFolder,
        checkpoints: Checkpoints,
        display: Display,
    ):
        self.setup, self.config, self.record = setup, setup.config, record
        self.folder, self.checkpoints, self.display = folder, checkpoints, display
        # One assignment changes both: an interrupt must not come between a state and its number.
        self._now = (state, step)
        self.saved = step  # step of the newest checkpoint
        self.bad_steps = 0
        self.stop = False
        self.loggers = Loggers(folder, self.config, start=step)
        self.extrapolation = None
        if self.config.foresight.extrapolate.schedule != "off":
            key = self._key(_SEARCH, 0)
            self.extrapolation = Extrapolation(setup, folder, state.params, key, self._check_stop)

    @property
    def state(self) -> State:
        return self._now[0]

    @property
    def step(self) -> int:
        return self._now[1]

    def run(self) -> Result:
        record = self.record
        with on_signal(self._ask_to_stop):
            try:
                self._loop()
                self._save_at_end()
                return Result(
                    self._export(),
                    record.before,
                    record.after,
                    record.teacher,
                    record.seconds,
                    record.tokens,
                    self.setup.prompts.task[0].text,
                    record.reached and tuple(record.reached),
                    self.extrapolation and (record.accepted, record.search_seconds, record.search_tokens),
                )
            except Interrupted:
                self._save_at_end()
                raise Interrupted(
                    f"stopped after step {self.step} of {self.config.steps}; everything is saved"
                ) from None
            except BaseException as error:
                self._rescue(error)
                raise
            finally:
                self.loggers.close()

    def _loop(self) -> None:
        config, retry = self.config, False
        self.display.status("compiling")
        while True:
            allocate = self.config.foresight.allocate
            if allocate.mode == "freeze" and self.step == allocate.steps and not self.record.frozen:
                self._freeze()
            if self._search_due():
                self._search()
            if self._evaluation_due():
                self._evaluate()
            retry |= self._write_failed()
            if self.step > self.saved and (retry or self.step % config.checkpoint.every == 0):
                retry = not self._save()
            self._check_stop()
            if self.step >= config.steps:
                return
            start = time.perf_counter()
            metrics = self._one_step()
            self.record.seconds += time.perf_counter() - start
            if self.step % config.logging.every == 0 or self.step == config.steps:
                metrics |= dynamics(self.config.foresight, self.state, self.record.frozen)
                self._write(self.loggers.write, self.step, metrics)
            self.display.step(self.step, metrics)
            self.bad_steps = 0 if metrics["finite"] else self.bad_steps + 1
            if self.bad_steps >= config.max_bad_steps:
                raise TrainingError(
                    f"the loss or the gradient was not finite in the last {self.bad_steps} steps (up to step "
                    f"{self.step}); those steps changed nothing, and their batches are in "
                    f"{self.folder.path}/bad_batch_*.npz. The model as it was before them is in "
                    f"{self._export()}: a new run with it as student.path and a smaller "
                    "optimizer.learning_rate goes on from there"
                )

    def _one_step(self) -> dict[str, float]:
        """Samples, scores and updates on the next batch."""
        clock, step = Clock(), self.step
        key = self._key(_ROLLOUT, step)
        batch, metrics = make_batch(self.setup, self.state.params, step, key, lambda _: self._check_stop())
        clock.lap("rollout", batch)
        batch, teacher_params, hidden = self.setup.scorer.score(self.state, batch)
        if self.setup.scorer.measures:
            looked = self.setup.scorer.measure(self.state, teacher_params, batch, hidden)
            batch, weighed = weigh(self.setup, batch, looked)
            metrics |= weighed
        if self.setup.scorer.passes:
            clock.lap("scoring", (batch, hidden))
        state, measured = self.setup.update(self.state, teacher_params, batch, hidden, self.setup.frozen)
        self._now = (state, step + 1)
        clock.lap("update", state)
        metrics |= {name: float(value) for name, value in measured.items()}
        self.record.tokens += metrics["tokens"]
        if not metrics["finite"]:
            self._write(self._keep_bad_batch, batch)
        return metrics | clock.metrics(metrics["tokens"])

    def _keep_bad_batch(self, batch: Batch) -> None:
        path = self.folder.path / f"bad_batch_{self.step}.npz"
        self.display.print(
            f"step {self.step}: the loss or its gradient is not finite; skipped, batch in {path}"
        )
        arrays = parallel.to_host({k: v for k, v in batch._asdict().items() if v is not None})
        if parallel.is_first():
            np.savez(path, **arrays)

    def _write(self, write: Callable[..., None], *args: Any) -> None:
        """Calls `write`; a full disk costs lines of a log, not the run."""
        try:
            write(*args)
        except OSError as error:
            self.display.print(f"WARNING: step {self.step} could not be written down: {error}")

    def _key(self, purpose: int, step: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(self.setup.key, purpose), step)

    def _freeze(self) -> None:
        self.setup, state, self.record.frozen, notice = freeze_modules(self.setup, self.state)
        self._now = (state, self.step)
        self.display.print(f"step {self.step}: {notice}")

    def _search_due(self) -> bool:
        if self.extrapolation is None or self.record.searched == self.step:
            return False
        return self.extrapolation.due(self.step)

    def _search(self) -> None:
        """Extrapolates; what is interrupted here is done again after a resume."""
        state, found = self.extrapolation.search(self.state)
        self._now = (state, self.step)
        record, seconds = self.record, found["extrapolate_seconds"]
        record.searched, record.accepted = self.step, record.accepted + bool(found["extrapolate_factor"])
        record.seconds, record.search_seconds = record.seconds + seconds, record.search_seconds + seconds
        record.search_tokens += int(found["extrapolate_tokens"])
        self._write(self.loggers.write, self.step, found)
        self.display.print(
            f"step {self.step}: extrapolated by {found['extrapolate_factor']:g}: score "
            f"{found['extrapolate_start']:.4f} -> {found['extrapolate_score']:.4f}, {seconds:.1f} s"
        )

    def _evaluation_due(self) -> bool:
        step, every = self.step, self.config.evaluation.every
        if self.setup.held_out is None or self.record.evaluated == step:
            return False
        return step in (0, self.config.steps) or bool(every and step % every == 0)

    def _evaluate(self) -> None:
        record, step = self.record, self.step
        if step == 0 and self.config.evaluation.teacher and not record.teacher:
            with jax.set_mesh(self.setup.teacher_mesh):
                record.teacher, _ = self._accuracy(self.setup.teacher, "evaluating the teacher")
            self._announce("teacher", record.teacher)
        metrics, samples = self._accuracy(self.setup.model(self.state.params), "evaluating the student")
        self._announce("student" if step else "student before training", metrics)
        record.before, record.after = record.before or metrics, metrics
        record.evaluated, target = step, self.config.evaluation.target
        if target is not None and record.reached is None and metrics["accuracy"] >= target:
            record.reached = (step, record.tokens)
        self.display.keep({"accuracy": metrics["accuracy"]})
        self._write(self.loggers.write, step, metrics)
        samples = samples[: self.config.logging.samples]
        self._write(self.folder.write_samples, step, samples)
        for sample in samples:
            self.display.sample(**sample)

    def _announce(self, who: str, metrics: dict[str, float]) -> None:
        self.display.print(
            f"step {self.step}: {who}: accuracy {metrics['accuracy']:.3f} "
            f"+- {metrics['accuracy_error']:.3f} on {len(self.setup.held_out)} held-out prompts"
        )

    def _accuracy(self, model: Any, text: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
        config, prompts = self.config.evaluation, self.setup.held_out
        report = self.display.task(text, len(prompts) * config.samples)

        def progress(done: int, total: int, _mean: float) -> None:
            report(done, total)
            self._check_stop()

        result = tasks.evaluate(
            model,
            prompts,
            key=self._key(_EVALUATION, 0),  # the same at every step: differences are the model's
            max_new_tokens=self.config.max_new_tokens,
            samples=config.samples,
            sampling=Sampling(temperature=config.temperature),
            stop_token_ids=self.setup.stops,
            pass_k=config.pass_k,
            context=prompts.context_bucket is not None and model is self.setup.teacher,
            on_progress=progress,
        )
        metrics = {"accuracy": result.accuracy, "accuracy_error": result.standard_error}
        for k, (value, error) in result.pass_at_k.items():
            metrics |= {f"pass@{k}": value, f"pass@{k}_error": error}
        metrics |= {"evaluation_length": result.mean_length, "evaluation_truncated": result.truncated}
        samples = [
            dict(prompt=r.prompt, completion=r.completion, reward=r.reward)
            for r in result.records[:: config.samples]
        ]
        return metrics, samples

    def _write_failed(self) -> bool:
        """Whether a checkpoint that was being written has failed; says so."""
        try:
            self.checkpoints.check()
        except CheckpointError as error:
            self.saved = max(self.checkpoints.steps, default=0)
            self.display.print(f"WARNING: {error}; trying again with the next step")
            return True
        return False

    def _save(self) -> bool:
        """Starts writing a checkpoint; on failure says so, and training goes on to try again."""
        try:
            self.checkpoints.save(self.step, self.state, dataclasses.asdict(self.record))
        except CheckpointError as error:
            self.display.print(f"WARNING: {error}; trying again after the next step")
            return False
        self.saved = self.step
        return True

    def _save_at_end(self) -> None:
        """Saves what is not saved yet and waits for the disk."""
        try:
            if self._write_failed() or self.step > self.saved or not self.checkpoints.steps:
                self.display.status("saving a checkpoint")
                self.checkpoints.wait()  # for one that may be on its way
                if self.step not in self.checkpoints.steps:
                    self.checkpoints.save(self.step, self.state, dataclasses.asdict(self.record))
            self.checkpoints.wait()
            self.saved = self.step
        except CheckpointError as error:
            steps = self.checkpoints.steps
            raise TrainingError(
                f"{error}. "
                + (
                    f"The newest checkpoint is that of step {steps[-1]}"
                    if steps
                    else "There is no checkpoint"
                )
                + "; make room and run the same command again to go on from there"
            ) from error

    def _rescue(self, error: BaseException) -> None:
        """After anything unforeseen: saves the last good state, unless a failed step has given it away, or
        other processes know nothing of it and would not take part."""
        if jax.process_count() > 1 and not getattr(error, "everywhere", False):
            return
        try:
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
                self._save_at_end()
        except Exception as error:  # what went wrong first is what the user must see
            self.display.print(f"WARNING: {error}")

    def _export(self) -> Path:
        self.display.status(f"writing {self.folder.model}")
        lora, params = self.config.lora, self.state.params
        if not lora.rank:
            models.save(self.setup.model(params), self.folder.model)
            return self.folder.model
        adapted = nnx.merge(self.setup.graphdef, params, self.setup.frozen)
        if lora.save == "adapter":
            models.save_lora(adapted, self.folder.model, base=self.config.student.path)
        else:
            models.save(models.merge_lora(adapted), self.folder.model)
        return self.folder.model

    def _ask_to_stop(self) -> None:
        self.stop = True
        # Not through the display: the signal may have come in the middle of its own writing.
        os.write(2, b"\nstopping; once more to stop at once\n")

    def _check_stop(self) -> None:
        if parallel.anybody(self.stop):
            raise Interrupted
