"""The loop: the only place with state, files and clocks."""

import dataclasses
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from opd_jax import models, tasks
from opd_jax.config import Config
from opd_jax.rollout import Sampling
from opd_jax.training._batches import make_batch
from opd_jax.training._checkpoint import CheckpointError, Checkpoints
from opd_jax.training._logging import Display, Loggers
from opd_jax.training._run import RunFolder
from opd_jax.training._setup import Setup, prepare
from opd_jax.training._step import Batch, State

_ROLLOUT, _EVALUATION = 0, 1  # one key per purpose


class Interrupted(Exception):
    """The run was asked to stop, and everything is saved."""


class TrainingError(RuntimeError):
    """The run cannot go on; what was trained is saved."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        model: folder of the trained model.
        before, after: evaluations of the student, {"accuracy": ..., "accuracy_error": ...,
            "pass@k": ...}; empty without `evaluation.prompts`.
        teacher: the same of the teacher, if `evaluation.teacher`.
        seconds: spent in steps, over all starts of the run.
        tokens: completion tokens trained on.
    """

    model: Path
    before: dict[str, float]
    after: dict[str, float]
    teacher: dict[str, float]
    seconds: float
    tokens: int


def train(config: Config) -> Result:
    """Runs a config from its last checkpoint, or from the start, to its end.

    Args:
        config: see `opd_jax.config`; `run_dir` must be set.

    Returns:
        A `Result`.

    Raises:
        ValueError: if the config, the data or the models do not fit together.
        Interrupted: after Ctrl-C or SIGTERM; the same call goes on where it stopped.
        TrainingError: if too many steps in a row were not finite, or the last checkpoint failed.
    """
    config.validate()
    with RunFolder(config.run_dir, config) as folder, Display(config.steps) as display:
        for notice in folder.notices:
            display.print(notice)
        setup, state = prepare(config, display)
        checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
        try:
            with jax.set_mesh(setup.mesh):  # kernels that XLA cannot partition look it up
                return _Run(setup, state, folder, checkpoints, display).run()
        finally:
            checkpoints.close()


@dataclasses.dataclass
class _Record:
    """What a checkpoint holds besides arrays."""

    step: int = 0
    evaluated: int = -1
    bad_steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    before: dict[str, float] = dataclasses.field(default_factory=dict)
    after: dict[str, float] = dataclasses.field(default_factory=dict)
    teacher: dict[str, float] = dataclasses.field(default_factory=dict)


class _Run:
    """A run in progress: its state, and where it is written down."""

    def __init__(
        self, setup: Setup, state: State, folder: RunFolder, checkpoints: Checkpoints, display: Display
    ):
        self.setup, self.config = setup, setup.config
        self.state, self.record = state, _Record()
        self.folder, self.checkpoints, self.display = folder, checkpoints, display
        self.saved = 0  # step of the newest checkpoint
        self.stop = False
        restored = checkpoints.restore(state)
        if restored is not None:
            self.saved, self.state, record = restored
            self.record = _Record(**record)
            display.print(f"resuming {folder.path} at step {self.saved}")
        self.loggers = Loggers(folder, self.config, start=self.record.step)

    def run(self) -> Result:
        try:
            with _on_signal(self._ask_to_stop):
                self._loop()
        except Interrupted:
            self._save_at_end()
            raise Interrupted(
                f"stopped after step {self.record.step} of {self.config.steps}; everything is saved"
            ) from None
        except BaseException:
            # A step that failed half-way has given its buffers away; any other leaves a good state.
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
                self._save_at_end()
            raise
        finally:
            self.loggers.close()
        self._save_at_end()
        record = self.record
        return Result(
            self._export(), record.before, record.after, record.teacher, record.seconds, record.tokens
        )

    def _loop(self) -> None:
        record, config = self.record, self.config
        retry = False
        while True:
            if self._evaluation_due():
                self._evaluate()
            due = record.step % config.checkpoint.every == 0 or retry
            if due and record.step > self.saved:
                retry = not self._save()
            self._check_stop()
            if record.step >= config.steps:
                return
            start = time.perf_counter()
            metrics = self._step(record.step)
            record.seconds += time.perf_counter() - start
            record.step += 1
            if record.step % config.logging.every == 0 or record.step == config.steps:
                self.loggers.write(record.step, metrics)
            self.display.step(record.step, metrics)
            record.bad_steps = 0 if metrics["finite"] else record.bad_steps + 1
            if record.bad_steps >= config.max_bad_steps:
                raise TrainingError(
                    f"the loss or the gradient was not finite in the last {record.bad_steps} steps (up to "
                    f"step {record.step}); those steps changed nothing, and their batches are in "
                    f"{self.folder.path}/bad_batch_*.npz. A smaller optimizer.learning_rate may help"
                )

    def _step(self, step: int) -> dict[str, float]:
        """Samples, scores and updates on the batch of `step`."""
        clock = _Clock()
        key = self._key(_ROLLOUT, step)
        batch, metrics = make_batch(self.setup, self.state.params, step, key, lambda _: self._check_stop())
        clock.lap("rollout", batch)
        hidden = teacher_params = None
        if self.setup.teacher is not None:
            teacher_params = nnx.state(self.setup.teacher)
            hidden = self.setup.score(teacher_params, batch)
            clock.lap("scoring", hidden)
        self.state, measured = self.setup.update(self.state, teacher_params, batch, hidden)
        metrics |= {name: float(value) for name, value in measured.items()}
        clock.lap("update", self.state)
        self.record.tokens += metrics["tokens"]
        if not metrics["finite"]:
            self._keep_bad_batch(step + 1, batch)
        return metrics | clock.metrics(metrics["tokens"])

    def _keep_bad_batch(self, step: int, batch: Batch) -> None:
        path = self.folder.path / f"bad_batch_{step}.npz"
        np.savez(path, **{k: np.asarray(v) for k, v in batch._asdict().items() if v is not None})
        self.display.print(f"step {step}: the loss or its gradient is not finite; skipped, batch in {path}")

    def _key(self, purpose: int, step: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(self.setup.key, purpose), step)

    def _evaluation_due(self) -> bool:
        step, every = self.record.step, self.config.evaluation.every
        if self.setup.held_out is None or self.record.evaluated == step:
            return False
        return step in (0, self.config.steps) or bool(every and step % every == 0)

    def _evaluate(self) -> None:
        record, step = self.record, self.record.step
        if step == 0 and self.config.evaluation.teacher and not record.teacher:
            record.teacher, _ = self._accuracy(self.setup.teacher, "evaluating the teacher")
            self._announce("teacher", record.teacher)
        metrics, samples = self._accuracy(self.setup.model(self.state.params), "evaluating the student")
        self._announce("student" if step else "student before training", metrics)
        record.before, record.after = record.before or metrics, metrics
        record.evaluated = step
        self.display.keep({"accuracy": metrics["accuracy"]})
        self.loggers.write(step, metrics)
        samples = samples[: self.config.logging.samples]
        self.folder.write_samples(step, samples)
        for sample in samples:
            self.display.sample(**sample)

    def _announce(self, who: str, metrics: dict[str, float]) -> None:
        self.display.print(
            f"step {self.record.step}: {who}: accuracy {metrics['accuracy']:.3f} "
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

    def _save(self) -> bool:
        """Saves a checkpoint; on failure says so, and training goes on to try again after the next step."""
        try:
            self.checkpoints.save(self.record.step, self.state, dataclasses.asdict(self.record))
        except CheckpointError as error:
            self.display.print(f"WARNING: {error}; trying again after the next step")
            return False
        self.saved = self.record.step
        return True

    def _save_at_end(self) -> None:
        """Saves what is not saved yet and waits for the disk."""
        try:
            if self.record.step > self.saved or not self.checkpoints.steps:
                self.display.status("saving a checkpoint")
                self.checkpoints.save(self.record.step, self.state, dataclasses.asdict(self.record))
                self.saved = self.record.step
            self.checkpoints.wait()
        except CheckpointError as error:
            raise TrainingError(
                f"{error}. The newest checkpoint is that of step {max(self.checkpoints.steps, default=0)}; "
                "make room and run the same command again to go on from there"
            ) from error

    def _export(self) -> Path:
        self.display.status(f"writing {self.folder.model}")
        models.save(self.setup.model(self.state.params), self.folder.model)
        return self.folder.model

    def _ask_to_stop(self) -> None:
        self.stop = True
        self.display.print("stopping after this step; again to stop at once")

    def _check_stop(self) -> None:
        if self.stop:
            raise Interrupted


class _Clock:
    """Seconds of each part of a step."""

    def __init__(self):
        self._parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str, result: Any) -> None:
        jax.block_until_ready(result)
        now = time.perf_counter()
        self._parts[name], self._last = now - self._last, now

    def metrics(self, tokens: int) -> dict[str, float]:
        total = sum(self._parts.values())
        metrics = {"step_seconds": total, "tokens_per_second": tokens / total}
        for name, seconds in self._parts.items():
            metrics[f"{name}_share"] = seconds / total
            metrics[f"{name}_tokens_per_second"] = tokens / seconds
        return metrics


@contextmanager
def _on_signal(ask: Callable[[], None]):
    """Calls `ask` on the first Ctrl-C or SIGTERM; a second one acts as usual."""
    old = {}

    def handle(number, frame):
        signal.signal(number, old[number])
        ask()

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: the program around us handles signals
        pass
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
