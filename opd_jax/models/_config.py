"""What a decoder is: sizes and switches, read from and written to a Hugging Face config.json."""

import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts: `linear` or `llama3`."""

    type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


@dataclass(frozen=True)
class Family:
    """What an architecture name implies. A bias of None is read from the config.json."""

    model_type: str
    qk_norm: bool = False
    attention_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = False
    head_width: int | None = None  # When the config.json is silent; None: width / heads.
    kv_heads: int | None = None  # When the config.json is silent; None: as many as heads.


FAMILIES = {
    "LlamaForCausalLM": Family("llama", mlp_bias=None),
    "Qwen2ForCausalLM": Family("qwen2", attention_bias=True, output_bias=False, kv_heads=32),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, head_width=128, kv_heads=32),
}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a `Decoder`. Hashable, so it can be a static argument of `jax.jit`."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ff_width: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-6
    qk_norm: bool = False
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    output_bias: bool = False
    """A bias on the attention's output projection."""
    mlp_bias: bool = False
    tie_embeddings: bool = False
    max_length: int = 2048
    architecture: str = "LlamaForCausalLM"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    hf: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    """The config.json this was read from, None for a model made here."""
    source: Path | None = field(default=None, compare=False, repr=False)
    """The folder or GGUF file this was read from: `save` takes the tokenizer from there."""

    def __post_init__(self):
        if self.architecture not in FAMILIES:
            raise ValueError(_unknown_architecture(self.architecture, self.source))
        for name in (
            "vocab_size",
            "width",
            "layers",
            "heads",
            "kv_heads",
            "head_width",
            "ff_width",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a positive integer")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_width % 2:
            raise ValueError(f"head_width is {self.head_width}; rotary embeddings need an even one")

    @classmethod
    def from_hf(cls, config: dict[str, Any], source: str | Path | None = None) -> "DecoderConfig":
        """Reads the contents of a Hugging Face config.json (of transformers 4 or 5).

        Args:
            config: the parsed config.json.
            source: the folder it comes from, for messages and for `save`.

        Raises:
            ValueError: on an unknown architecture, a missing size, or a setting that would change
                the result and is not implemented (sliding windows, other rotary types, ...).
        """
        architecture = (config.get("architectures") or [None])[0]
        if architecture not in FAMILIES:
            raise ValueError(_unknown_architecture(architecture, source))
        family = FAMILIES[architecture]
        _refuse_unsupported(config, architecture, source)
        required = dict(
            vocab_size="vocab_size",
            width="hidden_size",
            layers="num_hidden_layers",
            heads="num_attention_heads",
            ff_width="intermediate_size",
        )
        for key in required.values():
            if config.get(key) is None:
                raise ValueError(f"config.json of {source or architecture} has no {key!r}")
        sizes = {ours: config[theirs] for ours, theirs in required.items()}
        # A key that is absent takes the architecture's default; an explicit null means "derive it".
        kv_heads = config.get("num_key_value_heads", family.kv_heads) or sizes["heads"]
        head_width = config.get("head_dim", family.head_width)
        if not head_width:
            head_width, rest = divmod(sizes["width"], sizes["heads"])
            if rest:
                raise ValueError(
                    f"config.json of {source or architecture}: hidden_size {sizes['width']} is not"
                    f" a multiple of num_attention_heads {sizes['heads']}, and head_dim is not given"
                )
        bias = bool(config.get("attention_bias", False))
        theta, scaling = _read_rope(config, source or architecture)
        eos = config.get("eos_token_id")
        return cls(
            **sizes,
            kv_heads=kv_heads,
            head_width=head_width,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
            qk_norm=family.qk_norm,
            attention_bias=bias if family.attention_bias is None else family.attention_bias,
            output_bias=bias if family.output_bias is None else family.output_bias,
            mlp_bias=bool(config.get("mlp_bias", False)) if family.mlp_bias is None else False,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_length=config.get("max_position_embeddings", 2048),
            architecture=architecture,
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            hf=copy.deepcopy(config),
            source=None if source is None else Path(source),
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns a config.json: the one this was read from, with our fields written over it.

        Raises:
            ValueError: if the architecture has no such variant (a Qwen2 without biases, ...), so
                that nobody could read the config.json back as what it is.
        """
        family = FAMILIES[self.architecture]
        hf = copy.deepcopy(self.hf or {})
        hf.pop("quantization_config", None)  # What `save` writes is not quantised.
        hf.update(
            architectures=[self.architecture],
            model_type=family.model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_width,
            intermediate_size=self.ff_width,
            hidden_act="silu",
            rms_norm_eps=self.norm_epsilon,
            tie_word_embeddings=self.tie_embeddings,
            max_position_embeddings=self.max_length,
            bos_token_id=self.bos_token_id,
            eos_token_id=list(self.eos_token_ids) or None,
        )
        if len(self.eos_token_ids) == 1:
            hf["eos_token_id"] = self.eos_token_ids[0]
        if "layer_types" in hf:
            hf["layer_types"] = ["full_attention"] * self.layers
        if family.attention_bias is None:
            hf["attention_bias"] = self.attention_bias
        if family.mlp_bias is None:
            hf["mlp_bias"] = self.mlp_bias
        hf.update(_write_rope(self))
        read = DecoderConfig.from_hf(hf)
        if lost := [f.name for f in fields(self) if f.compare and _differ(self, read, f.name)]:
            told = ", ".join(f"{name}={getattr(self, name)!r}" for name in lost)
            raise ValueError(f"a config.json of {self.architecture} cannot express {told}")
        return hf


def _differ(a: DecoderConfig, b: DecoderConfig, name: str) -> bool:
    return getattr(a, name) != getattr(b, name)


def _unknown_architecture(architecture: Any, source: Any) -> str:
    where = f" (in {source})" if source else ""
    return f"unknown architecture {architecture!r}{where}; known: {', '.join(FAMILIES)}"


def _refuse_unsupported(config: dict[str, Any], architecture: str, source: Any) -> None:
    """Raises on settings that would silently change the logits."""
    where = f"config.json of {source or architecture}"
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ValueError(f"{where}: hidden_act {act!r} is not supported; supported: silu")
    sliding = "sliding_attention" in (config.get("layer_types") or ())
    if config.get("use_sliding_window") and config.get("sliding_window"):
        sliding |= config.get("max_window_layers", 28) < config.get("num_hidden_layers", 32)
    if sliding:
        raise ValueError(
            f"{where}: sliding-window attention is not supported"
            f" (use_sliding_window={config.get('use_sliding_window')},"
            f" sliding_window={config.get('sliding_window')})"
        )


def _read_rope(config: dict[str, Any], where: Any) -> tuple[float, RopeScaling | None]:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"config.json of {where}: partial_rotary_factor {partial} is not supported")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ValueError(
            f"config.json of {where}: rope type {kind!r} is not supported; supported: default, linear, llama3"
        )
    names = dict(factor="factor")
    if kind == "llama3":
        names.update(low_freq_factor="low_freq_factor", high_freq_factor="high_freq_factor")
    missing = [theirs for theirs in names.values() if theirs not in rope]
    if missing:
        raise ValueError(f"config.json of {where}: rope type {kind!r} lacks {', '.join(missing)}")
    values = {ours: float(rope[theirs]) for ours, theirs in names.items()}
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings")
        original = original or config.get("original_max_position_embeddings")
        values["original_max_length"] = int(original or config.get("max_position_embeddings", 2048))
    return theta, RopeScaling(kind, **values)


def _write_rope(config: DecoderConfig) -> dict[str, Any]:
    """Both spellings, so that transformers 4, 5 and other readers see the same frequencies."""
    scaling = config.rope_scaling
    if scaling is None:
        parameters: dict[str, Any] = {"rope_type": "default"}
    else:
        parameters = {"rope_type": scaling.type, "factor": scaling.factor}
        if scaling.type == "llama3":
            parameters.update(
                low_freq_factor=scaling.low_freq_factor,
                high_freq_factor=scaling.high_freq_factor,
                original_max_position_embeddings=scaling.original_max_length,
            )
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else dict(parameters),
        "rope_parameters": {**parameters, "rope_theta": config.rope_theta},
    }
