"""Checkpoints: atomic, asynchronous, and checked when they are read.

Orbax writes and commits them. It does not notice a flipped bit in an array file, so each array's checksum,
taken on the device before the save, stands beside it and is compared after every restore.
"""

import itertools
import json
import logging
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax import parallel
from opd_jax._extras import require
from opd_jax.training._errors import CheckpointError

_log = logging.getLogger(__name__)


@jax.jit
def checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A position-dependent sum of each array's bits modulo 2^32, as uint32.

    Every weight is odd, so that no single flipped bit goes unseen; integer sums do not depend on how an array
    is sharded.
    """
    return {name: _checksum(a) for name, a in arrays.items()}


def _checksum(a: jax.Array) -> jax.Array:
    unsigned = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
    bits = a.astype(jnp.uint8) if a.dtype == bool else jax.lax.bitcast_convert_type(a, unsigned)
    if bits.dtype.itemsize > 4:
        raise TypeError(f"checkpoints hold arrays of at most 32 bits an element, got {a.dtype}")
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(a.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * (place * jnp.uint32(2654435761)) + 1))


class Checkpoints:
    """The checkpoints of one run, newest last.

    Args:
        folder: where they are; made if missing.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self._ocp = require("orbax.checkpoint")
        self._folder = folder.absolute()
        self._manager = self._ocp.CheckpointManager(
            self._folder,
            options=self._ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    @property
    def steps(self) -> list[int]:
        """Steps that are on disk whole, in order, as process 0 sees them; orbax's own list counts those being
        written."""
        found = sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdigit())
        return parallel.of_first(found)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts writing `state` (a pytree of arrays) and `record` (JSON); returns before it is on disk.

        Raises:
            CheckpointError: if the disk has no room, or this or an earlier write failed. Checkpoints
                already written are untouched.
        """
        arrays = _flatten(state)
        need = sum(a.nbytes for a in arrays.values())
        free = shutil.disk_usage(self._folder).free
        if parallel.anybody(free < need):
            raise CheckpointError(
                f"no room for the checkpoint of step {step} in {self._folder}: it takes {need / 1e6:.1f} MB, "
                f"{free / 1e6:.1f} MB are free"
            )
        sums = {name: int(value) for name, value in checksums(arrays).items()}
        body = json.dumps(
            {"record": record, "arrays": {name: [_kind(a), sums[name]] for name, a in arrays.items()}}
        )
        self.check()
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(arrays),
            record=self._ocp.args.JsonSave({"body": body, "crc32": zlib.crc32(body.encode())}),
        )
        self._all(lambda: self._manager.save(step, args=args))

    def check(self) -> None:
        """Raises CheckpointError if writing in the background has failed since the last call."""
        self._all(self._manager.check_for_errors)

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            CheckpointError: if a write failed.
        """
        self._all(self._manager.wait_until_finished)
        self.check()

    def _all(self, call: Callable[[], Any]) -> None:
        """Calls it on every process; where it fails on one, it has failed for all."""
        try:
            parallel.together(call)
        except Exception as error:  # orbax and tensorstore raise many kinds
            _require_agreed(error)
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        """Clears away what a failed write left, which may be what fills the disk."""
        for part in self._folder.glob("*.orbax-checkpoint-tmp*") if parallel.is_first() else ():
            shutil.rmtree(part, ignore_errors=True)
        return CheckpointError(_short(f"writing a checkpoint to {self._folder} failed", error))

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest checkpoint that is intact: (step, state, record); None if there is none at all.

        Args:
            like: a pytree of ShapeDtypeStructs (or arrays) with the structure, dtypes and shardings wanted,
                or a function that makes one of a checkpoint's record.

        Raises:
            CheckpointError: if there are checkpoints and every one of them is damaged.
        """
        wrong = []
        for step in reversed(self.steps):
            try:
                state, record = self._restore(step, like)
            except Exception as error:
                _require_agreed(error)
                wrong.append((step, _short(f"step {step}", error)))
                _log.warning("checkpoint of %s; trying the one before", wrong[-1][1])
                continue
            if parallel.is_first():
                for damaged, _ in wrong:  # out of the way of the new checkpoint of that step
                    self._set_aside(damaged)
            parallel.of_first(None)  # the others wait for it
            self._manager.reload()
            return step, state, record
        if wrong:
            raise CheckpointError(
                f"no checkpoint in {self._folder} can be read: " + "; ".join(message for _, message in wrong)
            )
        return None

    def _restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        # No process waits for another within `_read`: it may fail on the one whose part is damaged.
        treedef, names, state, body = parallel.together(lambda: self._read(step, like))
        for name, value in checksums(state).items():
            if int(value) != body["arrays"][name][1]:
                raise CheckpointError(f"{name} is damaged (checksum differs)")
        return jax.tree.unflatten(treedef, [state[name] for name in names]), body["record"]

    def _read(self, step: int, like: Any) -> tuple[Any, list[str], dict[str, jax.Array], dict[str, Any]]:
        """(structure, names in its order, arrays by name, what stands beside them) of a checkpoint."""
        args = self._ocp.args
        with self._reader() as reader:
            saved = reader.restore(step, args=args.Composite(record=args.JsonRestore())).record
            if zlib.crc32(saved["body"].encode()) != saved["crc32"]:
                raise CheckpointError("its record is damaged (checksum differs)")
            body = json.loads(saved["body"])
            like = like(body["record"]) if callable(like) else like
            wanted = {  # in the tree's order; jax.tree.map over the dict would sort it
                name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
                for name, a in _flatten(like).items()
            }
            _compare({name: kind for name, (kind, _) in body["arrays"].items()}, wanted)
            state = reader.restore(step, args=args.Composite(state=args.StandardRestore(wanted))).state
        return jax.tree.structure(like), list(wanted), state, body

    def _reader(self) -> Any:
        """A manager of this process alone, which waits for no other; orbax's own `restore` ends with all
        processes waiting for each other, and one that has failed does something else."""
        me = jax.process_index()
        alone = self._ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader_{me}"
        )
        options = self._ocp.CheckpointManagerOptions(
            create=False, read_only=True, multiprocessing_options=alone
        )
        return self._ocp.CheckpointManager(self._folder, options=options)

    def _set_aside(self, step: int) -> None:
        """Renames a checkpoint, so that it is kept but seen no more."""
        names = (f"damaged-{step}" + f".{i}" * (i > 1) for i in itertools.count(1))
        free = next(name for name in names if not (self._folder / name).exists())
        (self._folder / str(step)).rename(self._folder / free)

    def close(self) -> None:
        """Ends writing in the background; what failed there has been told by `wait`."""
        try:
            self._manager.close()
        except Exception as error:
            _log.debug("closing the checkpoints: %s", error)


def _require_agreed(error: Exception) -> None:
    """Raises the error again if other processes may not know of it: what failed is not a checkpoint, but the
    message between them, and this process must not wait for the others as if all were leaving."""
    if parallel.several() and not getattr(error, "everywhere", False):
        raise error


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def _kind(a: Any) -> str:
    return f"{a.dtype}{list(a.shape)}"


def _compare(saved: dict[str, str], wanted: dict[str, Any]) -> None:
    """Raises CheckpointError, naming the first difference, if other arrays were saved than are wanted."""
    for name in sorted(saved.keys() | wanted.keys()):
        there = saved.get(name, "nothing")
        here = _kind(wanted[name]) if name in wanted else "nothing"
        if there != here:
            raise CheckpointError(
                f"it is of another model or optimizer: it has {there} as {name}, this run needs {here}"
            )


def _short(what: str, error: Exception) -> str:
    """One line: tensorstore's messages run to pages."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{what}: {type(error).__name__}: {first[:160]}"
