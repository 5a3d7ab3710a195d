"""Many processes, each with devices of its own, that run one program together.

JAX's multi-controller runtime does the work: every process runs the same Python and launches the same
programs in the same order. What is here keeps the Python alike: decisions that could differ (a signal, a full
disk, a file that one host does not see) are taken by all together, and an error of one is an error of all.
With a single process each function is what its name says, and costs nothing.
"""

import contextlib
import functools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

T = TypeVar("T")
_POLL = 0.5  # seconds between two tries to reach the coordinator
_GRACE = 10  # seconds that news of a dead process may take
_STATE = {"heartbeat": 100}


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout_seconds: int = 100,
) -> None:
    """Joins the other processes of a run by `jax.distributed.initialize`, before any computation.

    Without arguments, JAX finds out by itself on Cloud TPU, SLURM and Kubernetes. A process that does not
    come within `initialization_timeout`, or that gives no sign of life for `heartbeat_timeout_seconds`, ends
    all others: JAX's coordination service names it and aborts them.

    Args:
        coordinator_address: HOST:PORT of process 0.
        num_processes: how many there are.
        process_id: which of them this is, from 0.
        initialization_timeout: seconds.
        heartbeat_timeout_seconds: seconds.

    Raises:
        ValueError: on arguments that make no sense, or if there are none and JAX cannot find them out.
        ConnectionError: if the coordinator cannot be reached.
    """
    _STATE["heartbeat"] = heartbeat_timeout_seconds
    given = dict(coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id)
    _check(given)
    if process_id:  # the runtime would abort without a word of why
        _reach(coordinator_address, initialization_timeout)
    if coordinator_address is not None:
        who = f"process {process_id} of {num_processes}"
        print(f"{who}: waiting for all at {coordinator_address}", file=sys.stderr, flush=True)
    with _roll_call(initialization_timeout):
        try:
            jax.distributed.initialize(
                **given,
                initialization_timeout=initialization_timeout + 30,
                heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            )
        except ValueError as error:
            raise ValueError(
                f"JAX finds no Cloud TPU, SLURM or Kubernetes that names the processes ({error}); "
                "say --coordinator_address HOST:PORT --num_processes N --process_id I"
            ) from error


def _check(given: dict[str, Any]) -> None:
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given, too, or none of {', '.join(given)}")
    address, count, index = given.values()
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator_address is {address!r}; it must be HOST:PORT")
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            f"process_id is {index} of num_processes {count}; ids are from 0 to num_processes - 1"
        )


@contextlib.contextmanager
def _roll_call(seconds: int) -> Iterator[None]:
    """Lets JAX's coordination service wait so long for all processes, and then say which are missing; by
    default its clients give up first, and nobody learns who did not come."""
    from jaxlib import _jax

    make = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = functools.partial(make, cluster_register_timeout=seconds)
    try:
        yield
    finally:
        _jax.get_distributed_runtime_service = make


def _reach(address: str, timeout: float) -> None:
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise ConnectionError(
                    f"the coordinator {address} cannot be reached ({error}), tried for {timeout} s: does "
                    "process 0 run there, and is the port open?"
                ) from error
        time.sleep(_POLL)


def _gather(value: Any, tiled: bool = False) -> np.ndarray:
    """Host arrays of all processes, one below the other; `tiled`: an array on all their devices, whole."""
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(value, tiled=tiled)


def everybody(text: str) -> list[str]:
    """What each process says, in their order; all must call."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = _gather(np.array([data.size], np.int32)).ravel()
    if not sizes.any():
        return [""] * sizes.size
    width = 1 << int(sizes.max()).bit_length()  # few widths: each compiles a program
    rows = _gather(np.pad(data, (0, width - data.size)))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def anybody(flag: bool) -> bool:
    """Whether it is so on any process; all must call."""
    if jax.process_count() == 1:
        return flag
    return bool(_gather(np.array([flag])).any())


def of_first(value: T) -> T:
    """What process 0 gives, JSON; all must call."""
    return value if jax.process_count() == 1 else json.loads(everybody(json.dumps(value))[0])


def several() -> bool:
    """Whether there is more than this process; asks no device."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


class ElsewhereError(ValueError):
    """What went wrong on another process."""


def together(call: Callable[[], T]) -> T:
    """Calls it on every process; if it raises on any, all raise: an own error, or else an `ElsewhereError`.

    The error has the attribute `everywhere`: nobody waits for this process any more.
    """
    if jax.process_count() == 1:
        return call()
    error, result = None, None
    try:
        result = call()
    except Exception as caught:
        error = caught
    said = everybody("" if error is None else f"{type(error).__name__}: {error}")
    failed = [f"process {i}: {text}" for i, text in enumerate(said) if text]
    if not failed:
        return result
    if error is None:
        error = ElsewhereError(failed[0])
    error.everywhere = True
    raise error


def first_then_others(call: Callable[[], T]) -> T:
    """`together`, process 0 before the others."""
    if jax.process_count() == 1:
        return call()
    results = [together(lambda: call() if is_first() else None)]
    results.append(together(lambda: None if is_first() else call()))
    return results[0 if is_first() else 1]


def shared(call: Callable[[int], float], count: int) -> np.ndarray:
    """[call(0), ..., call(count - 1)] as float32, each called on one process only."""
    mine = range(jax.process_index(), count, jax.process_count())
    values = np.zeros(count, np.float32)

    def fill():
        for i in mine:
            values[i] = call(i)

    together(fill)
    if jax.process_count() == 1:
        return values
    return _gather(values).sum(axis=0)


def to_host(tree: Any) -> Any:
    """Its arrays whole, as numpy arrays, on every process; all must call."""

    def fetch(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return _gather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)


def place(tree: Any, sharding: Sharding) -> Any:
    """Puts host arrays, which every process has whole, onto the devices: each process its own part."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree)


def leave(error: BaseException) -> None:
    """After an error: ends the process if others may be waiting for it, so that they learn of it.

    A process that only raised would wait at its exit for the others, which wait for it in a collective. One
    whose collective failed waits for the coordination service, which tells who died and aborts. Without
    others, or where all know of the error, it returns.
    """
    if not several():
        return
    if getattr(error, "everywhere", False):
        jax.distributed.shutdown()
        return
    if re.match("[A-Z_]{5,}: ", str(error)):  # a status of XLA, which comes as errors of several kinds
        print("another process may have died; JAX soon says which", file=sys.stderr, flush=True)
        time.sleep(_STATE["heartbeat"] + _GRACE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def same_everywhere(what: dict[str, Any]) -> None:
    """Raises ValueError on every process if they do not all have equal values, naming the differences.

    Args:
        what: name -> value, JSON.
    """
    if jax.process_count() == 1:
        return
    all_of_them = [json.loads(text) for text in everybody(json.dumps(what))]
    lines = _differences(all_of_them)
    if lines:
        error = ValueError("the processes do not agree:\n" + "\n".join(f"  - {line}" for line in lines))
        error.everywhere = True
        raise error


def _differences(them: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each key and process whose value is not that of process 0."""
    first, lines = them[0], []
    for key in dict.fromkeys(name for each in them for name in each):
        for i, other in enumerate(them):
            if other.get(key) != first.get(key):
                lines.append(f"{key} is {first.get(key)!r} on process 0, {other.get(key)!r} on process {i}")
    return lines


@jax.jit
def _any(flags: jax.Array) -> jax.Array:
    return jnp.any(flags)


def any_of(flags: jax.Array) -> bool:
    """Whether any of them is true, wherever they are."""
    return bool(_any(flags))
