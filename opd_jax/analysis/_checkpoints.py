"""Checkpoints of any run, a tensor at a time: folders, hub ids, run folders, adapters, trees in memory."""

import abc
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.analysis._names import step_of
from opd_jax.models import resolve
from opd_jax.models._adapters import CONFIG as ADAPTER_CONFIG
from opd_jax.models._files import read_json

BLOCK = 1 << 21
"""Elements that are read at once."""


class Checkpoint(abc.ABC):
    """Named matrices, read when asked for.

    Attributes:
        label: what messages and tables call it.
        step: of training; None if nothing tells it.
        architecture: as its configuration names it; "" if nothing tells it.
    """

    label: str
    step: int | None = None
    architecture: str = ""

    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of all matrices: Hugging Face names where there are any; `name[i]` for a stack's parts."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, int]:
        """(rows, columns): a linear map has its outputs as rows, as in Hugging Face checkpoints."""

    @abc.abstractmethod
    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """The matrix from its first row on, `rows` at a time, [<= rows, columns] float32."""

    @abc.abstractmethod
    def digest(self, name: str) -> str:
        """A hash of the content; reads all of it."""

    def identity(self, name: str) -> str | None:
        """What tells without reading that the content is still the same; None if nothing does."""
        return None

    def read(self, name: str) -> np.ndarray:
        """The whole matrix, [m, n] float32."""
        return np.concatenate(list(self.blocks(name, rows_at_once(self.shape(name)))))

    def difference(self, base: "Checkpoint", name: str, rows: int) -> Iterator[np.ndarray]:
        """The update W - W_base in blocks of rows, float32."""
        for mine, other in zip(self.blocks(name, rows), base.blocks(name, rows), strict=True):
            yield mine - other


def open_checkpoint(
    source: Any, *, base: Checkpoint | None = None, step: int | None = None, label: str | None = None
) -> Checkpoint:
    """Opens a checkpoint; nothing but names and shapes is read until asked for.

    Args:
        source: a Hugging Face folder (one file or shards; float32, bfloat16 or float16), a hub id, a run
            folder of `opd-jax train` (its final model) or one of its `checkpoints`, a folder with a LoRA
            adapter of `base`, a `Decoder`, its `nnx.State`, or any tree of arrays; a `Checkpoint` is returned
            as it is. In a tree every array with two axes or more that is no bias and no norm is a matrix or a
            stack of them; a "kernel" is [in, out] and is read transposed.
        base: what a LoRA adapter is added to.
        step: of training; None: as the path tells (`checkpoint-500`, `global_step_20`, `7`).
        label: for messages and tables; None: the path.

    Raises:
        ValueError: if files are missing or damaged, weights are quantised, or an adapter comes without base.
        FileNotFoundError: if there is nothing at that path.

    Example:
        >>> import numpy as np
        >>> tree = {"layers": {"attention": {"q": {"kernel": np.ones((2, 4, 6), np.float32)}}}}
        >>> checkpoint = open_checkpoint(tree)
        >>> checkpoint.names()[1], checkpoint.shape(checkpoint.names()[1])
        ('model.layers.1.self_attn.q_proj.weight', (6, 4))
    """
    from opd_jax.analysis._orbax import StepCheckpoint, is_step
    from opd_jax.analysis._sources import AdapterCheckpoint, FolderCheckpoint, TreeCheckpoint

    if isinstance(source, Checkpoint):
        return source
    if not isinstance(source, str | Path):
        opened = TreeCheckpoint(source)
    else:
        folder = _model_folder(resolve(source))
        if (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
            opened = AdapterCheckpoint(folder, base)
        elif is_step(folder):
            opened = StepCheckpoint(folder)
        else:
            opened = FolderCheckpoint(folder)
        opened.label = str(source)
        opened.step = step_of(str(source))
    opened.step = opened.step if step is None else step
    opened.label = opened.label if label is None else label
    return opened


def rows_at_once(shape: tuple[int, int]) -> int:
    """How many rows make a block of about `BLOCK` elements."""
    return max(1, min(shape[0], BLOCK // max(shape[1], 1)))


def hash_of(shape: tuple[int, ...], dtype: str, parts: Iterator[Any]) -> str:
    """The digest of a tensor's bytes, shape and dtype."""
    digest = hashlib.sha256(f"{dtype}{list(shape)}".encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _model_folder(path: Path) -> Path:
    """The folder of the weights: the path itself, or `model` in it if it is a run folder."""
    if path.is_file():
        kind = "a GGUF file, whose weights are quantised" if path.suffix == ".gguf" else "a file"
        raise ValueError(f"{path} is {kind}; give a folder with config.json and safetensors")
    if (path / "config.yaml").exists() and not (path / "config.json").exists():
        if (path / "model" / "config.json").exists():
            return path / "model"
        raise ValueError(
            f"{path} is a run folder without a final model: the run has not come to its end; give "
            f"a checkpoint of it, such as {path / 'checkpoints' / 'STEP'}"
        )
    if (path / "config.json").exists():
        quantised = read_json(path, "config.json").get("quantization_config")
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise ValueError(
                f"{path / 'config.json'}: quantised ({method}) weights are not supported; give the "
                "checkpoint in bfloat16, float16 or float32"
            )
    return path
