"""Where each parameter of a `Decoder` lives in a Hugging Face checkpoint and in a GGUF file."""

from dataclasses import dataclass

import jax
from flax import nnx

from opd_jax.models._config import DecoderConfig

Path = tuple[str, ...]

# Parameter path -> (Hugging Face name, GGUF name). `{}` is the layer. Kernels, [in, out] here,
# are [out, in] there.
_NAMES = {
    "embedding": ("model.embed_tokens.weight", "token_embd.weight"),
    "norm.scale": ("model.norm.weight", "output_norm.weight"),
    "head.kernel": ("lm_head.weight", "output.weight"),
    "layers.attention_norm.scale": ("input_layernorm.weight", "attn_norm.weight"),
    "layers.mlp_norm.scale": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "layers.attention.q_norm.scale": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "layers.attention.k_norm.scale": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
}
for _ours, _hf, _gguf in (
    ("attention.q", "self_attn.q_proj", "attn_q"),
    ("attention.k", "self_attn.k_proj", "attn_k"),
    ("attention.v", "self_attn.v_proj", "attn_v"),
    ("attention.o", "self_attn.o_proj", "attn_output"),
    ("mlp.gate", "mlp.gate_proj", "ffn_gate"),
    ("mlp.up", "mlp.up_proj", "ffn_up"),
    ("mlp.down", "mlp.down_proj", "ffn_down"),
):
    _NAMES[f"layers.{_ours}.kernel"] = (f"{_hf}.weight", f"{_gguf}.weight")
    _NAMES[f"layers.{_ours}.bias"] = (f"{_hf}.bias", f"{_gguf}.bias")


@dataclass(frozen=True)
class Parameter:
    """One parameter: its path in the model, its shape, and the checkpoint tensors it is made of."""

    path: Path
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]  # One name, or one a layer if stacked.
    gguf_names: tuple[str, ...]
    stacked: bool
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the checkpoint."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def parameters(config: DecoderConfig, params: nnx.State) -> list[Parameter]:
    """Lists the parameters in `params`, the (abstract or real) state of a Decoder of `config`."""
    found = []
    for path, leaf in nnx.to_flat_state(params):
        if path[-1].endswith("_scale"):  # of int8 weights: no checkpoint holds them
            continue
        stacked = path[0] == "layers"
        hf, gguf = _NAMES[".".join(path)]
        layers = range(config.layers)
        hf_names = tuple(f"model.layers.{i}.{hf}" for i in layers) if stacked else (hf,)
        gguf_names = tuple(f"blk.{i}.{gguf}" for i in layers) if stacked else (gguf,)
        found.append(
            Parameter(tuple(path), tuple(leaf.shape), hf_names, gguf_names, stacked, path[-1] == "kernel")
        )
    return found


def replace_leaves(params: nnx.State, values: dict[Path, jax.Array]) -> nnx.State:
    """Returns `params` with the value of each parameter taken from `values` by its path."""
    flat = [(path, leaf.replace(values[tuple(path)])) for path, leaf in nnx.to_flat_state(params)]
    return nnx.from_flat_state(flat)
