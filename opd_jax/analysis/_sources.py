"""Where the matrices of a checkpoint come from: safetensors, an adapter on a base, a tree in memory."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from opd_jax.analysis._checkpoints import BLOCK, Checkpoint, hash_of, rows_at_once
from opd_jax.analysis._names import sort_key
from opd_jax.models import Decoder, merge_lora
from opd_jax.models._adapters import CONFIG, _AdapterReader, _read_config
from opd_jax.models._files import FolderReader, read_json
from opd_jax.models._names import _NAMES
from opd_jax.transforms._matrices import _VECTORS, path_name

_BYTES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_QUANTISED = re.compile(r"^(F8|F4|F6|I8|U8|I4|U4|E\d)")
_PACKED = re.compile(
    r"(qweight|qzeros|scales|absmax|quant_state\b.*|weight_packed|weight_scale|weight_scale_inv)$"
)


class _Slot(NamedTuple):
    """Where one matrix lies in a file."""

    file: Path
    offset: int  # bytes, of its first element
    shape: tuple[int, int]
    dtype: str


class FolderCheckpoint(Checkpoint):
    """A folder of safetensors files. Files are read, not mapped: mapped pages would count as memory."""

    def __init__(self, folder: Path):
        self.label = str(folder)
        reader = FolderReader(folder)  # checks that files are there, whole, and hold what the index says
        config = read_json(folder, "config.json") if (folder / "config.json").exists() else {}
        self.architecture = ", ".join(map(str, config.get("architectures") or ())) or str(
            config.get("model_type", "")
        )
        self._slots = _slots(reader)
        if config.get("tie_word_embeddings"):  # some tools store the tied matrix twice
            self._slots.pop("lm_head.weight", None)

    def names(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def shape(self, name: str) -> tuple[int, int]:
        return self._slots[name].shape

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        slot = self._slots[name]
        for raw in _raw(slot, rows):
            yield _float32(raw, slot.dtype)

    def digest(self, name: str) -> str:
        slot = self._slots[name]
        return hash_of(slot.shape, slot.dtype, _raw(slot, rows_at_once(slot.shape)))

    def identity(self, name: str) -> str:
        slot = self._slots[name]
        stat = slot.file.stat()  # ctime changes with every write, whatever is done to the mtime
        parts = (slot.file.resolve(), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, slot[1:])
        return "|".join(map(str, parts))


def _slots(reader: FolderReader) -> dict[str, _Slot]:
    headers: dict[str, dict[str, Any]] = {}
    found = {}
    for name in reader:
        file = reader.where(name)
        if file not in headers:
            headers[file] = _header(Path(file))
        entry = headers[file][name]
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        if _QUANTISED.match(dtype) or _PACKED.search(name):
            raise ValueError(
                f"{file}: tensor {name!r} ({dtype}) is of a quantised checkpoint, which is not supported; "
                "give it in bfloat16, float16 or float32"
            )
        if dtype not in _BYTES or len(shape) < 2 or min(shape[-2:]) < 2 or math.prod(shape) == 0:
            continue  # vectors, and buffers of integers
        start = entry["data_offsets"][0] + headers[file][""]["start"]
        size = shape[-2] * shape[-1] * np.dtype(_BYTES[dtype]).itemsize
        for i in range(math.prod(shape[:-2])):
            key = name if len(shape) == 2 else f"{name}[{i}]"
            found[key] = _Slot(Path(file), start + i * size, shape[-2:], dtype)
    if not found:
        raise ValueError(f"{reader.folder} holds no matrices")
    return dict(sorted(found.items(), key=lambda item: sort_key(item[0])))


def _header(file: Path) -> dict[str, Any]:
    """A safetensors header (8 bytes of length, then JSON); under "" where the data starts."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)) | {"": {"start": 8 + length}}


def _raw(slot: _Slot, rows: int) -> Iterator[np.ndarray]:
    """Blocks of rows as they are stored."""
    dtype, offset = np.dtype(_BYTES[slot.dtype]).newbyteorder("<"), slot.offset
    with slot.file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        for first in range(0, slot.shape[0], rows):
            block = np.empty((min(rows, slot.shape[0] - first), slot.shape[1]), dtype)
            view = memoryview(block).cast("B")
            while len(view):
                count = stream.readinto(view)
                if not count:
                    raise ValueError(f"{slot.file} is truncated; was it written while it was read?")
                view = view[count:]
            yield block


def _float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False)


class AdapterCheckpoint(Checkpoint):
    """A LoRA adapter merged into its base, W + alpha / rank B A in float32, without making all of it.

    Against that same base the update is alpha / rank B A itself, not what is left of it after rounding to the
    weights it is added to.
    """

    def __init__(self, folder: Path, base: Checkpoint | None):
        if base is None:
            told = read_json(folder, CONFIG).get("base_model_name_or_path")
            raise ValueError(
                f"{folder} is a LoRA adapter, which needs its base"
                + (f" (it names {told!r})" if told else "")
                + ": pass `base`, or merge it"
            )
        self.label, self.architecture, self._base = str(folder), base.architecture, base
        rank, alpha = _read_config(folder)
        self._scale = alpha / rank
        reader = _AdapterReader(folder)
        self._factors = {}
        found = {}
        for name in reader:
            match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", name)
            if match is None:
                raise ValueError(f"{reader.where(name)}: tensor {name!r} is no part of a plain LoRA adapter")
            reader.describe(name)
            found[f"{match[1]}.weight", match[2]] = reader.read(name, (slice(None), slice(None)))
        for target in dict.fromkeys(target for target, _ in found):
            self._factors[target] = self._pair(folder, target, found)

    def _pair(self, folder: Path, target: str, found: dict) -> tuple[np.ndarray, np.ndarray]:
        if (target, "A") not in found or (target, "B") not in found:
            raise ValueError(f"{folder}: the adapter of {target} lacks lora_A or lora_B")
        a, b = (np.asarray(found[target, part], np.float32) for part in "AB")
        if target not in self._base.names():
            raise ValueError(f"{folder} adapts {target!r}, which {self._base.label} does not have")
        shape = self._base.shape(target)
        if (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{folder}: lora_B {b.shape} times lora_A {a.shape} does not fit {target} {shape} of "
                f"{self._base.label}; is that the adapter's base?"
            )
        return a, b

    def names(self) -> tuple[str, ...]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, int]:
        return self._base.shape(name)

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        for block, update in zip(self._base.blocks(name, rows), self._updates(name, rows), strict=True):
            yield block + update

    def difference(self, base: Checkpoint, name: str, rows: int) -> Iterator[np.ndarray]:
        return self._updates(name, rows) if base is self._base else super().difference(base, name, rows)

    def _updates(self, name: str, rows: int) -> Iterator[np.ndarray]:
        height, width = self.shape(name)
        a, b = self._factors.get(name, (np.zeros((1, width), np.float32), np.zeros((height, 1), np.float32)))
        for first in range(0, height, rows):
            yield np.float32(self._scale) * (b[first : first + rows] @ a)

    def digest(self, name: str) -> str:
        if name not in self._factors:
            return self._base.digest(name)
        factors = [np.ascontiguousarray(f) for f in self._factors[name]]
        shape = (*self.shape(name), len(factors[0]))
        return hash_of(shape, f"LoRA {self._scale!r} {self._base.digest(name)}", iter(factors))

    def identity(self, name: str) -> str | None:
        return None if name in self._factors else self._base.identity(name)


class TreeCheckpoint(Checkpoint):
    """A tree of arrays. A Decoder's parameters have Hugging Face names; others are named by their paths."""

    def __init__(self, tree: Any):
        self.label = "in memory"
        if isinstance(tree, Decoder):
            self.architecture = str(tree.config.architecture)
            tree = merge_lora(tree)
        if isinstance(tree, nnx.Module):
            tree = nnx.state(tree, nnx.Param)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        self._take({path_name(path).replace("/", "."): leaf for path, leaf in leaves})

    def _take(self, leaves: dict[str, Any]) -> None:
        """Makes the leaves that are matrices, or stacks of them, the content."""
        self._entries: dict[str, tuple[Any, int | None, bool]] = {}
        for name, leaf in leaves.items():
            vector = getattr(leaf, "ndim", 0) < 2 or re.search(_VECTORS, name.lower())
            if not vector and min(leaf.shape[-2:]) > 1:
                self._add(name, leaf)
        self._entries = dict(sorted(self._entries.items(), key=lambda item: sort_key(item[0])))
        if not self._entries:
            raise ValueError(
                f"{self.label}: no matrices, that is arrays with two axes or more, no biases and no norms"
            )

    def _add(self, name: str, leaf: Any) -> None:
        transposed = name.endswith("kernel")
        known = _NAMES.get(name, (None,))[0]
        if leaf.ndim == 2:
            self._entries[known or name] = (leaf, None, transposed)
            return
        if leaf.ndim > 3:
            leaf = leaf.reshape(-1, *leaf.shape[-2:])
        for i in range(leaf.shape[0]):
            self._entries[f"model.layers.{i}.{known}" if known else f"{name}[{i}]"] = (leaf, i, transposed)

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, int]:
        leaf, _, transposed = self._entries[name]
        return tuple(leaf.shape[-2:][::-1]) if transposed else tuple(leaf.shape[-2:])

    def _stored(self, name: str) -> np.ndarray:
        leaf, index, transposed = self._entries[name]
        value = np.asarray(leaf if index is None else leaf[index])
        return value.T if transposed else value

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        value = self._stored(name)
        for first in range(0, len(value), rows):
            yield np.ascontiguousarray(value[first : first + rows], np.float32)

    def digest(self, name: str) -> str:
        value = self._stored(name)
        rows = max(1, BLOCK // value.shape[1])
        parts = (np.ascontiguousarray(value[i : i + rows]).view(np.uint8) for i in range(0, len(value), rows))
        return hash_of(value.shape, str(value.dtype), parts)
