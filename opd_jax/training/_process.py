"""Clocks and signals of a run."""

import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import jax


class Clock:
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
def on_signal(ask: Callable[[], None]):
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
