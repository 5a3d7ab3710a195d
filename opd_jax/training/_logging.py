"""Where numbers go (JSONL, TensorBoard, Weights & Biases) and what the terminal shows."""

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TextIO

from opd_jax._extras import require
from opd_jax.config import Config
from opd_jax.parallel import is_first
from opd_jax.training._run import RunFolder

# Metrics shown in the terminal: name in the metrics, label, format.
SHOWN = (
    ("loss", "loss", ".4f"),
    ("kl", "KL", ".4f"),
    ("reward", "reward", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("tokens_per_second", "tokens/s", ".0f"),
)


def require_loggers(config: Config) -> tuple[Any, Any]:
    """The modules of the loggers that are on (else None): TensorBoard's and Weights & Biases'.

    Raises:
        ImportError: one is on but not installed; says which extra brings it.
    """
    return (
        require("tensorboardX", "tensorboard") if config.logging.tensorboard else None,
        require("wandb", "wandb") if config.logging.wandb else None,
    )


class Loggers:
    """Writes metrics to the run folder, and to TensorBoard and Weights & Biases if asked for.

    Args:
        run_folder: an open `RunFolder`.
        config: `config.logging` says which loggers are on.
        start: the step resumed from; later lines of an earlier start are dropped.

    Raises:
        ImportError: a logger is on but not installed; says which extra brings it.

    Example:
        loggers = Loggers(run_folder, config)
        loggers.write(1, {"loss": 0.5})
        loggers.close()
    """

    def __init__(self, run_folder: RunFolder, config: Config, start: int = 0):
        self._run_folder, self._tensorboard, self._wandb = run_folder, None, None
        tensorboard, wandb = require_loggers(config) if is_first() else (None, None)
        if run_folder.resumed:
            run_folder.truncate(start)
        if tensorboard:
            self._tensorboard = tensorboard.SummaryWriter(
                str(run_folder.path / "tensorboard"), purge_step=start + 1 if start else None
            )
        if wandb:
            name = run_folder.path.resolve().name
            self._wandb = wandb.init(
                project=config.logging.wandb,
                name=name,
                id=_wandb_id(run_folder),
                resume="allow",
                dir=str(run_folder.path),
                config=asdict(config),
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of a step everywhere."""
        self._run_folder.write_metrics(step, metrics)
        if self._tensorboard is not None:
            for key, value in metrics.items():
                if math.isfinite(value):  # tensorboardX prints a complaint about others
                    self._tensorboard.add_scalar(key, float(value), step)
        if self._wandb is not None:
            self._wandb.log({key: float(value) for key, value in metrics.items()}, step=step)

    def close(self) -> None:
        """Flushes and closes the loggers; the run folder stays open."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def _wandb_id(run_folder: RunFolder) -> str:
    """The same id at every start in a folder, so that a resumed run goes on in its own page."""
    import secrets

    path = run_folder.path / "wandb_id"
    if not (run_folder.resumed and path.exists()):
        path.write_text(secrets.token_hex(6))
    return path.read_text().strip()


class Display:
    """What a run shows in the terminal: a live bar, or plain lines when there is no terminal.

    Args:
        total: steps of the run.
        file: where to write; None: standard output.
        interval: least seconds between two lines of progress without a terminal.
        quiet: show nothing (of many processes, one speaks).

    Example:
        with Display(total=100) as display:
            display.status("loading the student")
            report = display.task("evaluating", total=512)
            report(64)
            display.step(1, {"loss": 0.5, "tokens_per_second": 1200.0})
            display.print("saved")
    """

    def __init__(self, total: int, *, file: TextIO | None = None, interval: float = 5.0, quiet: bool = False):
        self._total, self._file, self._interval, self._quiet = total, file, interval, quiet
        self._kept: dict[str, float] = {}
        self._steps_begun = False
        self._clock = _Clock(total)
        self._shown_at = -float("inf")  # when the last plain line of progress was written
        self._phase: tuple[str, float] | None = None
        self._bar: Any = None
        self._run_task = self._phase_task = None

    def __enter__(self) -> "Display":
        file = self._file or sys.stdout
        if file.isatty() and not self._quiet:
            self._bar = _rich_bar(file)
            self._bar.start()
        return self

    def __exit__(self, failure, *_) -> None:
        if failure is not None:
            self._phase = None  # it did not come to its end: say nothing of it
        self._end_phase()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def status(self, text: str) -> None:
        """Says what happens now, until the next status, task or step."""
        self._begin_phase(text, None)

    def task(self, text: str, total: int = 0) -> Callable[..., None]:
        """A phase of known length.

        Returns:
            `report(done, total=None)`: how much is done by now, of how much if that was not known
            yet. It fits `on_progress` of `rollout.generate` and `progress` of `tasks.Prompts`.
        """
        self._begin_phase(text, total or None)
        phase = self._phase

        def report(done: int, total: int = total) -> None:
            if self._phase is not phase:  # another phase has begun
                return
            if self._bar is not None:
                self._bar.update(self._phase_task, completed=done, total=total or None)
            elif self._due():
                self._line(f"  {text}: {done}/{total}" if total else f"  {text}: {done}")
            if total and done >= total:
                self._end_phase()

        return report

    def keep(self, metrics: Mapping[str, float]) -> None:
        """Values to show with all further steps, such as the accuracy of the last evaluation."""
        self._kept.update(metrics)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows that `step` is done, with those of its metrics that are in `SHOWN`."""
        self._end_phase()
        left, values = self._clock.tick(step), {**self._kept, **metrics}
        words = [f"{label} {values[name]:{form}}" for name, label, form in SHOWN if name in values]
        words += [f"{left} left"] if left else []
        if self._bar is not None:
            if self._run_task is None:
                self._run_task = self._bar.add_task("step", total=self._total, text="")
            self._bar.update(self._run_task, completed=step, text="  ".join(words))
        elif self._due() or step == self._total or not self._steps_begun:
            self._line("  ".join((f"step {step}/{self._total}", *words)))
        self._steps_begun = True

    def print(self, text: str) -> None:
        """Prints text as it is, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._line(text)

    def sample(self, prompt: str, completion: str, reward: float | None = None) -> None:
        """Prints a prompt and what the model made of it."""
        mark = "" if reward is None else f"  (reward {reward:g})"
        self.print(f"  prompt: {_short(prompt)}\n  sample: {_short(completion)}{mark}")

    def _begin_phase(self, text: str, total: int | None) -> None:
        self._end_phase()
        self._phase = (text, time.monotonic())
        if self._bar is not None:
            self._phase_task = self._bar.add_task(text, total=total, text="")
        else:
            self._line(f"{text} ...")
            self._shown_at = time.monotonic()

    def _end_phase(self) -> None:
        if self._phase is None:
            return
        text, since = self._phase
        self._phase = None
        seconds = time.monotonic() - since
        if self._bar is not None:
            self._bar.remove_task(self._phase_task)
        if seconds >= 1:
            self.print(f"{text}: {seconds:.1f} s")

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._shown_at < self._interval:
            return False
        self._shown_at = now
        return True

    def _line(self, text: str) -> None:
        if not self._quiet:
            print(text.rstrip(), file=self._file or sys.stdout, flush=True)


class _Clock:
    """Time left: the median of the last step times, so that pauses and compilation do not count."""

    def __init__(self, total: int):
        self._total, self._last, self._since = total, 0, None
        self._seconds: deque[float] = deque(maxlen=50)

    def tick(self, step: int) -> str:
        now = time.monotonic()
        if self._since is not None and step > self._last:
            self._seconds.append((now - self._since) / (step - self._last))
        self._since, self._last = now, step
        if not self._seconds:
            return ""
        return _duration(statistics.median(self._seconds) * (self._total - step))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _short(text: str, limit: int = 400) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def _rich_bar(file: TextIO):
    require("rich")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    class Count(MofNCompleteColumn):
        def render(self, task):  # a phase of unknown length has a spinner only
            return super().render(task) if task.total is not None else ""

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        Count(),
        TextColumn("{task.fields[text]}", markup=False),
        console=Console(file=file),
    )
