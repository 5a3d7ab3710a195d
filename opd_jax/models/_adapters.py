"""Adapters out and in: the folder that `peft` writes and loads."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax._extras import require
from opd_jax.models._decoder import Decoder
from opd_jax.models._files import FolderReader, inside, read_json
from opd_jax.models._lora import Target, adapted, attach, check_plain, check_rank, find, layout, modules
from opd_jax.models._save import _replacing, _umask, _write_json
from opd_jax.parallel import is_first, to_host

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Of no effect on what the loaded model computes, or told by the tensors that are there.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
}
_READ = {"bias", "init_lora_weights", "lora_alpha", "peft_type", "r", "task_type", "use_rslora"}
# The other ways to initialise change the base's weights, which are then not those of the base's folder.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def save_lora(model: Decoder, path: str | Path, *, base: str | Path | None = None) -> None:
    """Writes the adapters of `model`, and only them, as a folder that `peft` and `load_lora` read.

    It appears at `path` complete or not at all. On several hosts every one must call; the first writes.

    Args:
        model: from `add_lora` or `load_lora`, its parameters anywhere.
        path: a new folder, or an earlier saved adapter, which is replaced.
        base: folder or hub id of the model without adapters, for the record; None: where it was loaded from.

    Raises:
        ValueError: if the model has no adapters.
        FileExistsError: if `path` is a file, or a folder with anything `save_lora` does not write.

    Example:
        >>> import tempfile, jax
        >>> from flax import nnx
        >>> from opd_jax import models
        >>> config = models.DecoderConfig(
        ...     vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, head_width=4, ff_width=32)
        >>> model = models.Decoder(config, rngs=nnx.Rngs(0))
        >>> adapted = models.add_lora(model, rank=4, alpha=8, targets=("q", "v"), key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     models.save_lora(adapted, folder + "/adapter", base="owner/base")
        ...     again = models.load_lora(model, folder + "/adapter")
        >>> again.layers.attention.q.adapter.alpha
        8.0
    """
    targets = adapted(model)
    if not targets:
        raise ValueError("the model has no adapters; save it with models.save")
    path = Path(path).expanduser().absolute()
    _check_replaceable(path)
    tensors = {}
    for target in targets:
        adapter = find(model, target.path).adapter
        for part, leaf in (("A", adapter.lora_a), ("B", adapter.lora_b)):
            stacked = to_host(leaf.get_value())
            for name, matrix in zip(target.hf_names, stacked, strict=True):
                tensors[_tensor(name, part)] = np.ascontiguousarray(matrix.T)
    if not is_first():
        return
    with _replacing(path) as folder:
        safetensors = require("safetensors.numpy")
        safetensors.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o666 & ~_umask())
        _write_json(folder / CONFIG, _config(model, targets, base))


def load_lora(model: Decoder, path: str | Path, *, dtype=jnp.float32) -> Decoder:
    """A copy of `model` with the adapters that `save_lora` or `peft` wrote.

    Args:
        model: the base, which is not changed; the adapters are laid out as its parameters are.
        path: a folder with adapter_config.json and adapter_model.safetensors.
        dtype: of the adapters, float32 or bfloat16.

    Raises:
        ValueError: if the folder holds anything but plain LoRA adapters of the modules of `add_lora`, in
            all layers and of one rank, naming the key or the tensor; or if the model has adapters already.
        FileNotFoundError: if there is no such folder.
    """
    check_plain(model)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter at {path}: there is no such folder")
    rank, alpha = _read_config(folder)
    reader = _AdapterReader(folder)
    found = set(reader)
    targets = [t for t in modules(model) if any(_tensor(n, p) in found for n in t.hf_names for p in "AB")]
    _check_tensors(reader, targets, rank)
    check_rank(rank, targets)
    pairs = {}
    for target in targets:
        shardings = layout(find(model, target.path).kernel.get_value())
        pairs[target.path] = tuple(
            _place(_stack(reader, target, part, dtype), sharding)
            for part, sharding in zip("AB", shardings, strict=True)
        )
    return attach(model, pairs, alpha)


class _AdapterReader(FolderReader):
    """The tensors of an adapter folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._handles: dict[str, Any] = {}
        if not inside(folder, WEIGHTS).exists():
            other = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
            raise ValueError(
                f"{folder} has no {WEIGHTS}"
                + (f", only {other[0]}: pickled weights are not read" if other else "")
            )
        self._file_of = dict.fromkeys(self._open(WEIGHTS), WEIGHTS)


def _tensor(module: str, part: str) -> str:
    return f"{_PREFIX}{module}.lora_{part}.weight"


def _config(model: Decoder, targets: list[Target], base: str | Path | None) -> dict[str, Any]:
    base = model.config.source if base is None else base
    adapter = find(model, targets[0].path).adapter
    alpha = adapter.alpha
    return {
        "base_model_name_or_path": None if base is None else str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": adapter.rank,
        "target_modules": sorted(target.hf_names[0].rsplit(".", 1)[1] for target in targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _read_config(folder: Path) -> tuple[int, float]:
    """(rank, alpha), the latter such that the adapters count alpha / rank."""
    if not inside(folder, CONFIG).exists():
        raise ValueError(f"{folder} is not an adapter folder: it has no {CONFIG}")
    config, where = read_json(folder, CONFIG), folder / CONFIG
    allowed = {
        "peft_type": ("LORA",),
        "task_type": ("CAUSAL_LM", None),
        "bias": ("none", None),
        "init_lora_weights": _INITS,
        "use_rslora": (True, False, None),
    }
    for key, values in allowed.items():
        if config.get(key) not in values:
            raise ValueError(
                f"{where}: {key} is {config.get(key)!r}; supported: {', '.join(map(repr, values))}"
            )
    # Of what else there is, now and in versions to come, only "not used" is known to be harmless.
    for key in sorted(set(config) - _IGNORED - _READ):
        if config[key]:
            raise ValueError(f"{where}: {key} is {config[key]!r}, which is not supported: plain LoRA only")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{where}: r is {rank!r}; it must be a positive integer")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ValueError(f"{where}: lora_alpha is {alpha!r}; it must be a number above 0")
    return rank, alpha * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _check_tensors(reader: FolderReader, targets: list[Target], rank: int) -> None:
    """Raises unless the file holds exactly A and B of the targets, in all layers and of that rank."""
    where = reader.folder / WEIGHTS
    shapes = {}
    for target in targets:
        into, out = target.shape[1:]
        for name in target.hf_names:
            shapes[_tensor(name, "A")] = (rank, into)
            shapes[_tensor(name, "B")] = (out, rank)
    found = set(reader)
    if extra := sorted(found - set(shapes)):
        listed = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
        raise ValueError(f"{where}: unexpected tensors: {listed}; adapters may be on the layers' linear maps")
    if missing := sorted(set(shapes) - found):
        raise ValueError(f"{where}: tensor {missing[0]!r} is missing; adapters must be on all layers")
    if not shapes:
        raise ValueError(f"{where} holds no tensors")
    for name, shape in shapes.items():
        actual, _ = reader.describe(name)
        if actual != shape:
            raise ValueError(f"{where}: tensor {name!r} has shape {actual}, expected {shape}")


def _stack(reader: FolderReader, target: Target, part: str, dtype) -> np.ndarray:
    """A or B of all layers, in our layout."""
    names = [_tensor(name, part) for name in target.hf_names]
    return np.stack([reader.read(name, (slice(None),) * 2).T for name in names]).astype(dtype)


def _place(value: np.ndarray, sharding) -> jax.Array:
    if sharding is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _check_replaceable(path: Path) -> None:
    """Refuses to replace anything that an earlier `save_lora` would not have written."""
    if not path.exists():
        return
    if not path.is_dir() or path.is_symlink():
        raise FileExistsError(f"{path} exists and is not a folder")
    if other := sorted(p.name for p in path.iterdir() if p.name not in (CONFIG, WEIGHTS)):
        raise FileExistsError(
            f"{path} exists and holds {other[0]!r}, which is no part of a saved adapter; give a new folder"
        )
