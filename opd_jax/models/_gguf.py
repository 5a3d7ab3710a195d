"""GGUF files, read-only: the configuration and the dequantised tensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax._extras import require
from opd_jax.models._config import FAMILIES, DecoderConfig, RopeScaling
from opd_jax.models._rope import rope_frequencies

_ARCHITECTURES = {family.model_type: name for name, family in FAMILIES.items()}


class GGUFReader:
    """Tensors of a GGUF file by their GGUF names, dequantised to float32; `config` is its model.

    References:
        https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """

    gguf = True

    def __init__(self, path: Path):
        self.path = path
        gguf = require("gguf")
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path} is truncated or not a GGUF file: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._dequantize = gguf.quants.dequantize
        self._fields = reader.fields
        self.config = self._read_config()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def where(self, name: str) -> str:
        """The file that holds tensor `name`, for messages."""
        return str(self.path)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape (row-major, as in Hugging Face files) and GGML type of a tensor."""
        tensor = self._tensors[name]
        return tuple(int(n) for n in reversed(tensor.shape)), tensor.tensor_type.name

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Dequantises a tensor and returns the part `index` of it."""
        tensor = self._tensors[name]
        shape, kind = self.describe(name)
        try:
            values = self._dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(
                f"{self.path}: tensor {name!r} of type {kind} cannot be dequantised: {error}"
            ) from error
        # llama.cpp stores the q and k rows of Llama (alone) for interleaved rotary pairs;
        # Hugging Face and we pair i with i + H/2.
        if self.config.architecture == "LlamaForCausalLM":
            heads = {"attn_q": self.config.heads, "attn_k": self.config.kv_heads}
            if count := heads.get(name.split(".")[-2]):
                pairs = values.reshape(count, -1, 2, *shape[1:])
                values = pairs.swapaxes(1, 2).reshape(shape)
        return values[index]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key."""
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def _read_config(self) -> DecoderConfig:
        kind = self.get("general.architecture")
        if kind not in _ARCHITECTURES:
            raise ValueError(
                f"{self.path}: unknown architecture {kind!r}; known: {', '.join(_ARCHITECTURES)}"
            )

        def need(key: str) -> Any:
            value = self.get(f"{kind}.{key}")
            if value is None:
                raise ValueError(f"{self.path} lacks the key '{kind}.{key}'")
            return value

        for name in ("token_embd.weight", "blk.0.attn_q.weight"):
            if name not in self._tensors:
                raise ValueError(f"{self.path} lacks the tensor {name!r}")
        heads = _uniform(self.path, "head_count", need("attention.head_count"))
        kv_heads = _uniform(self.path, "head_count_kv", self.get(f"{kind}.attention.head_count_kv", heads))
        # Inferred: writers disagree on which key holds the head width, the weights cannot.
        head_width = self.describe("blk.0.attn_q.weight")[0][0] // heads
        theta = _short(self.get(f"{kind}.rope.freq_base", 10000.0))
        eos = self.get("tokenizer.ggml.eos_token_id")
        return DecoderConfig(
            vocab_size=self.describe("token_embd.weight")[0][0],
            width=int(need("embedding_length")),
            layers=int(need("block_count")),
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            ff_width=_uniform(self.path, "feed_forward_length", need("feed_forward_length")),
            rope_theta=theta,
            rope_scaling=self._read_rope_scaling(kind, head_width, theta),
            norm_epsilon=_short(need("attention.layer_norm_rms_epsilon")),
            qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
            attention_bias="blk.0.attn_q.bias" in self._tensors,
            output_bias="blk.0.attn_output.bias" in self._tensors,
            mlp_bias="blk.0.ffn_gate.bias" in self._tensors,
            tie_embeddings="output.weight" not in self._tensors,
            max_length=int(self.get(f"{kind}.context_length", 2048)),
            architecture=_ARCHITECTURES[kind],
            bos_token_id=self.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=() if eos is None else (int(eos),),
            source=self.path,
        )

    def _read_rope_scaling(self, kind: str, head_width: int, theta: float) -> RopeScaling | None:
        rope_type = self.get(f"{kind}.rope.scaling.type", "none")
        if rope_type not in ("none", "linear"):
            raise ValueError(f"{self.path}: rope scaling {rope_type!r} is not supported")
        if "rope_freqs.weight" in self._tensors:
            # llama3 scaling comes as a table of divisors; find the parameters that give it.
            divisors = np.asarray(self._tensors["rope_freqs.weight"].data, np.float32)
            scaling = RopeScaling("llama3", factor=float(divisors.max()))
            plain = rope_frequencies(head_width, theta, None)
            expected = plain / rope_frequencies(head_width, theta, scaling)
            if divisors.shape != plain.shape or not np.allclose(divisors, expected, rtol=1e-4):
                raise ValueError(f"{self.path}: rope_freqs.weight is not the scaling of Llama 3")
            return scaling
        factor = self.get(f"{kind}.rope.scaling.factor", 1.0)
        return RopeScaling("linear", _short(factor)) if rope_type == "linear" else None


def _uniform(path: Path, key: str, value: Any) -> int:
    """One number for all layers; some models give a list."""
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise ValueError(f"{path}: {key} differs from layer to layer ({value}), not supported")
    return int(values.pop())


def _short(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747e-06."""
    return float(str(np.float32(value)))
