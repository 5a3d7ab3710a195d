"""Weights out: a Hugging Face folder, written whole or not at all."""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from opd_jax._extras import require
from opd_jax.models._decoder import Decoder
from opd_jax.models._files import INDEX, SINGLE, inside
from opd_jax.models._int8 import is_int8
from opd_jax.models._lora import LoRAParam
from opd_jax.models._names import Parameter, parameters
from opd_jax.models._tokenizer import load_tokenizer
from opd_jax.parallel import is_first, to_host

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_OTHER_FILES = ("config.json", "generation_config.json", INDEX)
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def save(model: Decoder, path: str | Path, *, max_shard_bytes: int = 5 * 2**30) -> None:
    """Writes `model` as a Hugging Face folder that `transformers` and `load` read.

    The folder holds the configuration, the weights in the parameters' dtype, and, from where the
    model was loaded, the tokenizer, chat template and generation config. It appears at `path`
    complete or not at all. On several hosts every one must call; the first writes.

    Args:
        model: a `Decoder`, its parameters anywhere.
        path: a new folder, or an earlier saved one, which is replaced.
        max_shard_bytes: weights are split into files of at most this size, except that a larger
            tensor has a file of its own.

    Raises:
        FileExistsError: if `path` is a file, or a folder with anything `save` does not write.
        ValueError: if the model has adapters, or int8 weights.
    """
    if is_int8(model):
        raise ValueError(
            "the model's weights are int8, rounded for scoring: no checkpoint holds them; load it in "
            "bfloat16 or float32 to save it"
        )
    if nnx.to_flat_state(nnx.state(model, LoRAParam)):
        raise ValueError("the model has adapters: save merge_lora(model), or the adapters alone by save_lora")
    path = Path(path).expanduser().absolute()
    _check_replaceable(path)
    _, params = nnx.split(model, nnx.Param)
    plan = _plan(model, params, max_shard_bytes)
    writer = is_first()
    with _replacing(path) if writer else contextlib.nullcontext() as folder:
        _write_weights(folder, params, plan)
        if folder is not None:
            _write_rest(folder, model)


def _plan(model: Decoder, params: nnx.State, limit: int) -> list[list[tuple[str, Parameter, int]]]:
    """Distributes (tensor name, parameter, layer) over files, in the order of the layers."""
    size = jnp.dtype(model.embedding.dtype).itemsize
    tensors = [
        (name, parameter, layer)
        for parameter in parameters(model.config, params)
        for layer, name in enumerate(parameter.hf_names)
    ]
    tensors.sort(key=lambda t: (t[1].stacked, t[2], t[0]))
    shards: list[list[tuple[str, Parameter, int]]] = [[]]
    filled = 0
    for tensor in tensors:
        need = size * int(np.prod(tensor[1].tensor_shape))
        if shards[-1] and filled + need > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += need
    return shards


def _write_weights(folder: Path | None, params: nnx.State, plan: list) -> None:
    leaves = {tuple(path): leaf.get_value() for path, leaf in nnx.to_flat_state(params)}
    weight_map, total = {}, 0
    for number, shard in enumerate(plan, start=1):
        file = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        tensors = {}
        for name, parameter, layer in shard:
            value = leaves[parameter.path]
            value = to_host(value[layer] if parameter.stacked else value)
            value = value.T if parameter.transposed else value
            tensors[name] = np.ascontiguousarray(value)
            weight_map[name] = file
            total += tensors[name].nbytes
        if folder is not None:
            safetensors = require("safetensors.numpy")
            safetensors.save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o666 & ~_umask())  # safetensors leaves it to the owner alone.
    if folder is not None and len(plan) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_rest(folder: Path, model: Decoder) -> None:
    config, source = model.config, model.config.source
    hf = config.to_hf()
    hf.pop("torch_dtype", None)
    hf["dtype"] = jnp.dtype(model.embedding.dtype).name
    _write_json(folder / "config.json", hf)
    ids = {"bos_token_id": hf["bos_token_id"], "eos_token_id": hf["eos_token_id"]}
    _write_json(folder / "generation_config.json", ids)
    if source is None or not source.exists():
        return
    if source.is_file():
        try:
            load_tokenizer(source).save_pretrained(folder)
        except ValueError as error:
            warnings.warn(f"the model is saved without a tokenizer: {error}", stacklevel=3)
        return
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(inside(source, name), folder / name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_replaceable(path: Path) -> None:
    """Refuses to replace anything that an earlier `save` would not have written."""
    if not path.exists():
        return
    if not path.is_dir() or path.is_symlink():
        raise FileExistsError(f"{path} exists and is not a folder")
    ours = {*TOKENIZER_FILES, *_OTHER_FILES}
    other = sorted(p.name for p in path.iterdir() if p.name not in ours and not _is_weight(p))
    if other:
        raise FileExistsError(
            f"{path} exists and holds {other[0]!r}, which is no part of a saved model; give a new folder"
        )


def _is_weight(path: Path) -> bool:
    return _WEIGHTS.fullmatch(path.name) is not None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of `path` if nothing goes wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for file in new.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if path.exists():
            path.rename(old)
        new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
