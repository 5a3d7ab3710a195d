"""Work on all cores, a bounded part of it in memory at a time."""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Progress = Callable[[str, float, float], None]
"""`progress(what, done, total)`; done and total are in units of work, nearly proportional to time."""


class Job(NamedTuple):
    """One piece of work.

    Attributes:
        run: called in a thread; numpy lets others run meanwhile.
        size: bytes it holds in memory.
        cost: for the time left, in any unit.
    """

    run: Callable[[], Any]
    size: int
    cost: float


def run_jobs(
    jobs: Sequence[Job], what: str, *, budget: int, workers: int | None, progress: Progress | None
) -> list[Any]:
    """The results of the jobs, in their order. No more of them run at once than fit the budget of bytes; one
    that exceeds it alone runs alone. After an error, or Ctrl-C, no further job begins."""
    workers = workers or available_cores()
    total, done, used = sum(job.cost for job in jobs), 0.0, 0
    results: list[Any] = [None] * len(jobs)
    running: dict[Future, int] = {}
    # Large ones first, so that none is left to run alone at the end.
    waiting = sorted(range(len(jobs)), key=lambda i: -jobs[i].cost)[::-1]
    if progress:
        progress(what, 0.0, total)
    with one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    if running and used + jobs[waiting[-1]].size > budget:
                        break
                    index = waiting.pop()
                    used += jobs[index].size
                    running[pool.submit(jobs[index].run)] = index
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index = running.pop(future)
                    results[index] = future.result()
                    used -= jobs[index].size
                    done += jobs[index].cost
                if progress:
                    progress(what, done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return results


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_blas_lock = threading.Lock()
_blas_users = [0, 0]  # who is inside, and the number of threads before the first


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """OpenBLAS, as numpy's wheels bring it, on one thread: ours are enough, and its own would fight for the
    cores (a hundredfold slowdown on a busy machine). Of no effect on other BLAS libraries."""
    library = _openblas()
    if library is None:
        yield
        return
    get, set_ = library
    with _blas_lock:
        if _blas_users[0] == 0:
            _blas_users[1] = get()
            set_(1)
        _blas_users[0] += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users[0] -= 1
            if _blas_users[0] == 0:
                set_(_blas_users[1])


def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    home = Path(np.__file__).parent
    for folder in (home.parent / "numpy.libs", home / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")) if folder.exists() else ():
            library = ctypes.CDLL(str(path))  # loaded already: this is a handle to it
            for prefix in ("scipy_openblas", "openblas"):
                for suffix in ("64_", "_64", ""):
                    get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
                    set_ = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
                    if get and set_:
                        return get, set_
    return None


class Bar:
    """Progress for people: a bar with the time left in a terminal, else a line now and then.

    Example:
        with Bar() as bar:
            geometry(base, checkpoint, progress=bar)
    """

    def __init__(self, interval: float = 10.0):
        self._interval, self._shown, self._bar, self._tasks = interval, 0.0, None, {}
        self._began: dict[str, float] = {}

    def __enter__(self) -> "Bar":
        import sys

        if sys.stderr.isatty():
            from opd_jax._extras import require

            progress, console = require("rich.progress"), require("rich.console")
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                console=console.Console(stderr=True),
            )
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: float, total: float) -> None:
        if total <= 0:
            return
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total)
            self._bar.update(self._tasks[what], completed=done, total=total)
            return
        now = time.monotonic()
        began = self._began.setdefault(what, now)
        if done <= 0 or (now - max(self._shown, began) < self._interval and done < total):
            return
        if done >= total and now - began < 1:
            return
        self._shown = now
        left = (now - began) * (total - done) / done
        import sys

        print(f"{what}: {done / total:.0%}, {_clock(left)} left", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
