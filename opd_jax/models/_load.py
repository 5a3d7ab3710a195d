"""Weights in: Hugging Face folders, hub ids and GGUF files."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from opd_jax import parallel
from opd_jax._extras import require
from opd_jax.models._attention import Implementation
from opd_jax.models._config import DecoderConfig
from opd_jax.models._decoder import Decoder, Remat
from opd_jax.models._files import FolderReader, read_json
from opd_jax.models._gguf import GGUFReader
from opd_jax.models._int8 import Quantiser, scale_path, with_int8
from opd_jax.models._names import Parameter, parameters, replace_leaves

HUB_PATTERNS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8)


class Reader(Protocol):
    """Named tensors of a checkpoint."""

    gguf: bool

    def __iter__(self): ...
    def where(self, name: str) -> str: ...
    def describe(self, name: str) -> tuple[tuple[int, ...], str]: ...
    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...


def load(
    path: str | Path,
    *,
    dtype=None,
    mesh: Mesh | None = None,
    attention: Implementation = "auto",
    remat: Remat = "none",
) -> Decoder:
    """Loads a decoder from a Hugging Face folder, a hub id or a GGUF file.

    Tensors are read one at a time, each straight into its place: beyond the model itself, the
    host holds one stacked parameter (with a mesh: one device's part of it), in the dtype it will have.

    Args:
        path: a folder with config.json and safetensors; a `.gguf` file; or else a hub id, which
            is fetched into (or, offline, read from) the Hugging Face cache.
        dtype: of the parameters, float32 or bfloat16; int8: the matrices are quantised while they are
            read, with a scale per output channel, for a bfloat16 model that does not change (it can be
            neither trained nor saved); None: as stored, 16-bit floats other than bfloat16 and quantised
            weights becoming float32.
        mesh: where to place the parameters (see `opd_jax.parallel`); None: the default device.
        attention: see `Decoder`.
        remat: see `Decoder`.

    Raises:
        ValueError: on an unknown architecture or a damaged checkpoint, naming the file, the tensor
            and what was expected.
        FileNotFoundError: if there is nothing at `path` and it cannot be a hub id.
    """
    path = resolve(path)
    config, reader = _open(path)
    model = abstract(config, dtype or _stored_dtype(reader), attention=attention, remat=remat)
    graphdef, params = nnx.split(model)
    wanted, leaves = parameters(config, params), dict(nnx.to_flat_state(params))
    _check(path, config, reader, wanted)
    shardings = {}
    if mesh is not None:
        tree = parallel.param_shardings(params, mesh)
        shardings = {tuple(p): leaf.get_value() for p, leaf in nnx.to_flat_state(tree)}
    values = {}
    for p in wanted:
        if scale_path(p.path) in leaves:
            values |= _place_int8(reader, p, shardings)
        else:
            read = functools.partial(_read, reader, p, leaves[p.path].dtype)
            values[p.path] = _place(p.shape, read, shardings.get(p.path))
    return nnx.merge(graphdef, replace_leaves(params, values))


def abstract(
    config: DecoderConfig,
    dtype=jnp.float32,
    *,
    attention: Implementation = "auto",
    remat: Remat = "none",
) -> Decoder:
    """A `Decoder` whose parameters are `jax.ShapeDtypeStruct`s: no memory, for ahead-of-time use."""
    if jnp.dtype(dtype) not in map(jnp.dtype, _DTYPES):
        raise ValueError(f"dtype is {jnp.dtype(dtype).name}; it must be float32, bfloat16 or int8")
    narrow = jnp.dtype(dtype) == jnp.int8

    def make() -> Decoder:
        floats = jnp.bfloat16 if narrow else dtype
        model = Decoder(config, rngs=nnx.Rngs(0), dtype=floats, attention=attention, remat=remat)
        return with_int8(model) if narrow else model

    return nnx.eval_shape(make)


def load_config(path: str | Path) -> DecoderConfig:
    """Reads only the `DecoderConfig` of what `load` would load."""
    return _config(resolve(path, weights=False))


def resolve(path: str | Path, *, weights: bool = True) -> Path:
    """The local folder or GGUF file that `path` names, fetched from the hub if it is a hub id.

    Args:
        path: a folder, a GGUF file, or a hub id.
        weights: False fetches only the configuration and the tokenizer.

    Raises:
        FileNotFoundError: if nothing is there and `path` does not look like a hub id.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    parts = str(path).split("/")
    if len(parts) != 2 or not all(parts) or any(p.startswith((".", "~")) for p in parts):
        raise FileNotFoundError(
            f"no model at {path}: not a folder, not a .gguf file, and not a hub id (owner/name)"
        )
    hub = require("huggingface_hub")
    patterns = [name for name in HUB_PATTERNS if weights or "safetensors" not in name]
    try:
        return Path(hub.snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:
        raise FileNotFoundError(
            f"no model at {path}: there is no such folder or file here, and as a hub id it could"
            f" not be fetched ({type(error).__name__}: {error})"
        ) from error


def _open(path: Path) -> tuple[DecoderConfig, Reader]:
    config = _config(path)
    return config, GGUFReader(path) if path.is_file() else FolderReader(path)


def _config(path: Path) -> DecoderConfig:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a file, but not a .gguf; give the model's folder")
        return GGUFReader(path).config
    if not (path / "config.json").exists():
        raise ValueError(f"{path} is not a model folder: it has no config.json")
    hf = read_json(path, "config.json")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method")
        raise ValueError(f"{path / 'config.json'}: quantised ({method}) weights are not supported")
    return DecoderConfig.from_hf(hf, source=path)


def _stored_dtype(reader: Reader) -> Any:
    name = "token_embd.weight" if reader.gguf else "model.embed_tokens.weight"
    known = name in set(reader)
    return jnp.bfloat16 if known and reader.describe(name)[1] == "BF16" else jnp.float32


def _check(path: Path, config: DecoderConfig, reader: Reader, wanted: list[Parameter]) -> None:
    """Raises unless the checkpoint holds exactly the tensors wanted, in the shapes wanted."""
    shapes = {}
    for parameter in wanted:
        names = parameter.gguf_names if reader.gguf else parameter.hf_names
        shapes.update(dict.fromkeys(names, parameter.tensor_shape))
    found = set(reader)
    missing = [name for name in shapes if name not in found]
    if missing:
        first = missing[0]
        hint = ""
        if first == "lm_head.weight":
            hint = " (config.json says tie_word_embeddings=false)"
        raise ValueError(
            f"{reader.where(first)}: tensor {first!r} of shape {shapes[first]} is missing{hint}"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    # Old checkpoints store rotary frequencies, and tied ones sometimes the head a second time.
    ignored = {"lm_head.weight", "output.weight"} if config.tie_embeddings else set()
    extra = sorted(
        name
        for name in found - set(shapes) - ignored
        if not name.endswith("rotary_emb.inv_freq") and name != "rope_freqs.weight"
    )
    if extra:
        listed = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise ValueError(f"{reader.where(extra[0])}: unexpected tensors for {config.architecture}: {listed}")
    for name, shape in shapes.items():
        actual, _ = reader.describe(name)
        if actual != shape:
            raise ValueError(f"{reader.where(name)}: tensor {name!r} has shape {actual}, expected {shape}")


def _place(shape: tuple[int, ...], read: Callable, sharding) -> jax.Array:
    """The array of what `read` gives, each device's part on its own if there is a sharding."""
    if sharding is None:
        return jnp.asarray(read(tuple(slice(0, size) for size in shape)))
    owners: dict[tuple, list[jax.Device]] = {}  # Devices that share a part share the reading.
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = tuple(i.indices(size)[:2] for i, size in zip(index, shape, strict=True))
        owners.setdefault(index, []).append(device)
    placed = []
    for index, devices in owners.items():
        part = read(tuple(slice(*i) for i in index))
        # Waited for, so that no more than one part is in the host's memory.
        placed += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _place_int8(reader: Reader, parameter: Parameter, shardings: dict) -> dict[tuple[str, ...], jax.Array]:
    """Reads one matrix, or a stack of them, as int8 with its scales."""
    names = parameter.gguf_names if reader.gguf else parameter.hf_names
    where = f"{reader.where(names[0])}: tensor {names[0]!r}"
    quantiser = Quantiser(parameter, functools.partial(_read, reader, parameter, np.float32), where)
    shape, scales = parameter.shape, scale_path(parameter.path)
    channels = (*shape[:-2], shape[-1] if parameter.transposed else shape[-2])
    return {
        parameter.path: _place(shape, quantiser.values, shardings.get(parameter.path)),
        scales: _place(channels, quantiser.scales, shardings.get(scales)),
    }


def _read(reader: Reader, parameter: Parameter, dtype, index: tuple[slice, ...]) -> np.ndarray:
    """Reads the part `index` of a parameter, in our layout, into a fresh buffer."""
    names = parameter.gguf_names if reader.gguf else parameter.hf_names
    out = np.empty([i.stop - i.start for i in index], dtype)
    names = names[index[0]] if parameter.stacked else names
    inner = index[1:] if parameter.stacked else index
    sizes = parameter.tensor_shape
    inner = inner[::-1] if parameter.transposed else inner
    inner = tuple(slice(None) if i == slice(0, n) else i for i, n in zip(inner, sizes, strict=True))
    for target, name in zip(out if parameter.stacked else [out], names, strict=True):
        tensor = reader.read(name, inner)
        target[...] = tensor.T if parameter.transposed else tensor
    return out
