"""Model folders: which files may be read, and the tensors in them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax._extras import require

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F64", "F32", "F16", "BF16"}


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, refusing names and links that lead out of it.

    Links into the blobs of the Hugging Face hub's cache (snapshots/X/name -> blobs/...) are fine.

    Raises:
        ValueError: if `name` is not a plain file name, or the file lies outside.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(f"{folder}: {name!r} is not a plain file name inside the folder")
    path = folder / name
    home, real = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"
    if real.parent != home and not (home.parent.name == "snapshots" and real.parent == blobs):
        raise ValueError(f"{path} is a link out of the folder, to {real}")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Reads a JSON object; ValueError, naming the file, if it holds anything else."""
    path = inside(folder, name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


class FolderReader:
    """Tensors of a folder of safetensors files, by their Hugging Face names.

    Raises:
        ValueError: if a file is missing, truncated or not listed as a plain name, or a tensor of
            the index is not where the index says.
    """

    gguf = False

    def __init__(self, folder: Path):
        self.folder = folder
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        if (folder / INDEX).exists():
            weight_map = read_json(folder, INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{folder / INDEX} has no 'weight_map'")
            for file in sorted(set(map(str, weight_map.values()))):
                self._open(file)
            self._file_of = {name: str(file) for name, file in weight_map.items()}
            for name, file in self._file_of.items():
                if name not in self._handles[file][1]:
                    raise ValueError(f"{folder / INDEX} places tensor {name!r} in {file}, which lacks it")
        elif (folder / SINGLE).exists():
            self._file_of = dict.fromkeys(self._open(SINGLE), SINGLE)
        else:
            other = sorted(p.name for p in folder.glob("*.bin")) + sorted(
                p.name for p in folder.glob("*.safetensors")
            )
            raise ValueError(
                f"{folder} has neither {SINGLE} nor {INDEX}"
                + (f", only {', '.join(other[:4])}" if other else "")
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def where(self, name: str) -> str:
        """The file that holds tensor `name`, for messages."""
        return str(self.folder / self._file_of.get(name, SINGLE))

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype ("F32", "BF16", ...) of a tensor."""
        view = self._handles[self._file_of[name]][0].get_slice(name)
        dtype = str(view.get_dtype())
        if dtype not in _DTYPES:
            raise ValueError(
                f"{self.where(name)}: tensor {name!r} has dtype {dtype}; supported:"
                f" {', '.join(sorted(_DTYPES))} (quantised checkpoints are not)"
            )
        return tuple(view.get_shape()), dtype

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads the part `index` of a tensor, and no more than that, from disk."""
        handle = self._handles[self._file_of[name]][0]
        if all(i == slice(None) for i in index):
            return handle.get_tensor(name)
        return handle.get_slice(name)[index]

    def _open(self, file: str) -> set[str]:
        path = inside(self.folder, file)
        if not path.exists():
            raise ValueError(f"{path} is missing, but {INDEX} lists it")
        safetensors = require("safetensors")
        try:
            handle = safetensors.safe_open(path, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
        names = set(handle.keys())
        self._handles[file] = (handle, names)
        return names
