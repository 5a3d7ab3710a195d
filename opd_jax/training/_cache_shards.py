"""The files of a teacher cache: one shard after the other, the index last."""

import json
import logging
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax._extras import require
from opd_jax.models._files import inside
from opd_jax.training._run import write_atomic

INDEX = "index.json"
_NAME = re.compile(r"shard-(\d{5,})\.safetensors")
_log = logging.getLogger(__name__)


class Shard:
    """One file: n examples with T tokens in all.

    Its arrays are ids [n] int64, hashes [n] uint64, offsets [n + 1] int64 into the tokens, checks [n]
    uint32 (CRC-32 of each example's part of the following); support [T, K] int32, log_probs [T, K] and tail
    [T] float32.

    Args:
        folder: of the cache.
        file: name of the file.
        size: bytes that it must have; None: any.
        settings: that it must have been written with; None: any.

    Raises:
        ValueError: if the file is missing, truncated, no shard, or of other settings.
    """

    def __init__(self, folder: Path, file: str, size: int | None = None, settings: dict | None = None):
        self.path = path = inside(folder, file)
        if not path.is_file():
            raise ValueError(f"{path} is missing, but {INDEX} lists it; run opd-jax cache-teacher again")
        self.bytes = path.stat().st_size
        if size is not None and self.bytes != size:
            raise ValueError(f"{path} is truncated or changed: it has {self.bytes} bytes, not {size}")
        safetensors = require("safetensors")
        try:
            self._handle = safetensors.safe_open(path, framework="numpy")
            self.settings = json.loads((self._handle.metadata() or {})["settings"])
            self.ids, self.hashes, self.offsets, self._checks = (
                self._handle.get_tensor(name) for name in ("ids", "hashes", "offsets", "checks")
            )
            shapes = [
                tuple(self._handle.get_slice(name).get_shape()) for name in ("support", "log_probs", "tail")
            ]
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is truncated or not a shard of a teacher cache: {error}") from error
        tokens, k = int(self.offsets[-1]), self.settings["top_k"]
        if shapes != [(tokens, k), (tokens, k), (tokens,)] or len(self.offsets) != len(self.ids) + 1:
            raise ValueError(f"{path} is damaged: {len(self.ids)} examples, {tokens} tokens, arrays {shapes}")
        if settings is not None:
            _compare(path, self.settings, settings)

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Support [n, K], log-probs [n, K] and tail [n] of an example, and no more than these, from disk.

        Raises:
            ValueError: if they are not what was written.
        """
        part = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        arrays = tuple(self._handle.get_slice(name)[part] for name in ("support", "log_probs", "tail"))
        if _check(arrays) != int(self._checks[row]):
            raise ValueError(f"{self.path}: example {self.ids[row]} is damaged (checksum differs)")
        return arrays


class ShardWriter:
    """Collects examples and writes them, a shard at a time.

    Args:
        folder: of the cache; made if missing. Complete shards that are there are kept.
        settings: of the cache, JSON.
        limit: bytes of a shard's arrays, except that one example is never split.

    Attributes:
        examples, tokens: written or collected.

    Raises:
        ValueError: if the folder holds shards of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], limit: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.settings, self._limit = folder, settings, limit
        self._known: dict[int, int] = {}
        self._done: list[Shard] = []
        self._buffer: list[tuple] = []
        self._filled = self.examples = self.tokens = 0
        for leftover in folder.glob(".*.part"):  # of a write that was cut off
            leftover.unlink()
        for path in sorted(folder.iterdir()):
            if _NAME.fullmatch(path.name):
                self._keep(path)

    def _keep(self, path: Path) -> None:
        try:
            shard = Shard(self.folder, path.name)
        except ValueError as error:
            _log.warning("%s; its examples are scored again", error)
            path.unlink()
            return
        _compare(path, shard.settings, self.settings)
        self._known.update(zip(shard.ids.tolist(), shard.hashes.tolist(), strict=True))
        self._done.append(shard)
        self.examples += len(shard.ids)
        self.tokens += int(shard.offsets[-1])

    def claim(self, example: int, digest: int) -> bool:
        """Whether the example is new here; from now on it is not.

        Raises:
            ValueError: if it came before with other tokens.
        """
        new = int(example) not in self._known
        if self._known.setdefault(int(example), digest) != digest:
            raise ValueError(
                f"example {example} is in {self.folder} with another prompt or completion: the data set, its "
                "template or the tokenizer has changed; write to a new folder"
            )
        return new

    def add(
        self, example: int, digest: int, support: np.ndarray, log_probs: np.ndarray, tail: np.ndarray
    ) -> None:
        """Takes an example; writes a shard where it would not fit into the one that is being filled."""
        need = support.nbytes + log_probs.nbytes + tail.nbytes
        if self._buffer and self._filled + need > self._limit:
            self.flush()
        # Copies: views would keep their whole batches.
        self._buffer.append((example, digest, support.copy(), log_probs.copy(), tail.copy()))
        self._filled += need
        self.examples, self.tokens = self.examples + 1, self.tokens + len(tail)

    def flush(self) -> None:
        """Writes what has been collected."""
        if not self._buffer:
            return
        ids, digests, *arrays = zip(*self._buffer, strict=True)
        checks = [_check(row) for row in zip(*arrays, strict=True)]
        names = ("support", "log_probs", "tail")
        tensors = {name: np.concatenate(rows) for name, rows in zip(names, arrays, strict=True)}
        tensors |= {
            "ids": np.array(ids, np.int64),
            "hashes": np.array(digests, np.uint64),
            "offsets": np.cumsum([0, *map(len, arrays[-1])], dtype=np.int64),
            "checks": np.array(checks, np.uint32),
        }
        data = require("safetensors.numpy").save(tensors, {"settings": json.dumps(self.settings)})
        number = max((int(_NAME.fullmatch(s.path.name)[1]) + 1 for s in self._done), default=0)
        path = self.folder / f"shard-{number:05d}.safetensors"
        write_atomic(path, data)
        self._buffer, self._filled = [], 0
        self._done.append(Shard(self.folder, path.name))

    def finish(self, teacher: str) -> None:
        """Writes what is left, and the index."""
        self.flush()
        index = {
            "format": 1,
            "teacher": teacher,
            "settings": self.settings,
            "examples": self.examples,
            "tokens": self.tokens,
            "shards": [
                {"file": s.path.name, "bytes": s.bytes, "examples": len(s.ids), "tokens": int(s.offsets[-1])}
                for s in self._done
            ],
        }
        write_atomic(self.folder / INDEX, json.dumps(index, indent=1).encode())


def _compare(path: Path, have: dict[str, Any], want: dict[str, Any]) -> None:
    """Raises ValueError, naming the first difference, unless a shard is of the settings wanted."""
    for name in want:
        if have.get(name) != want[name]:
            raise ValueError(
                f"{path} was made with {name} {have.get(name)}, not {want[name]}; use another folder, or "
                "delete this one"
            )


def _check(arrays: tuple[np.ndarray, ...]) -> int:
    value = 0
    for a in arrays:
        value = zlib.crc32(np.ascontiguousarray(a).tobytes(), value)
    return value
