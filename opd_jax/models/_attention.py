"""Scaled dot-product attention with a choice of implementation."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from opd_jax.parallel import platform

_LANES = 128  # Of a TPU register: the kernel's smallest block.

Implementation = Literal["auto", "xla", "cudnn", "splash"]


def check_implementation(implementation: str) -> None:
    """Raises ValueError if `implementation` is unknown or the default backend lacks it."""
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"attention is {implementation!r}; it must be one of {', '.join(get_args(Implementation))}"
        )
    needs = {"cudnn": "gpu", "splash": "tpu"}.get(implementation)
    if needs and platform() != needs:
        raise ValueError(
            f"attention={implementation!r} needs a {needs.upper()}, but the default backend is"
            f" {platform()!r}; use attention='auto' or 'xla'"
        )


def attend(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool,
    mask: Array | None = None,
    implementation: Implementation = "auto",
) -> Array:
    """Attention of `query` over `key` and `value`; softmax in float32.

    Args:
        query: [B, T, N, H].
        key: [B, S, K, H]; N is a multiple of K.
        value: [B, S, K, H].
        causal: hide from query t the keys behind t (S = T).
        mask: True where a key may be seen: [B, S] or [B, T, S].
        implementation: "xla"; "cudnn" (GPU) or "splash" (TPU) for causal calls, others going to
            XLA; or "auto": splash on TPU and cudnn on an NVIDIA GPU where they can run, else XLA, which
            holds all T x T scores.

    Returns:
        [B, T, N, H].
    """
    if not causal:  # One query or a few against a cache have no use for a blocked kernel.
        implementation = "xla" if implementation != "auto" else "auto"
    elif implementation == "splash" or (implementation == "auto" and _prefers_splash(query)):
        return _splash(query, key, value, mask)
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None, :, :]
    if implementation == "auto":
        implementation = "cudnn" if causal and mask is None and _prefers_cudnn(query) else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation=implementation
    )


def _prefers_cudnn(query: Array) -> bool:
    """On an NVIDIA GPU, for the dtypes and head widths that cuDNN's kernel has."""
    if platform() != "gpu" or "nvidia" not in jax.devices()[0].device_kind.lower():
        return False
    return query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[3] <= 128 and query.shape[3] % 8 == 0


def _prefers_splash(query: Array) -> bool:
    """On TPU, if the shape allows it, and either one device or a mesh set by `jax.set_mesh`.

    A kernel cannot be partitioned by XLA: the mesh must be known to map it by hand.
    """
    if platform() != "tpu" or query.shape[1] % _LANES or query.shape[3] % 64:
        return False
    return jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty


def _splash(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """Causal attention by the Pallas TPU kernel, mapped over the mesh in effect."""
    length = query.shape[1]
    if length % _LANES:
        raise ValueError(
            f"attention='splash' needs a sequence length that is a multiple of {_LANES}; it is {length}"
        )
    if mask is None:
        mask = jnp.ones(query.shape[:2], bool)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _splash_local(query, key, value, mask)
    rows = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)
    if query.shape[0] % math.prod(mesh.shape[axis] for axis in rows):
        rows = ()
    fits = "tensor" in mesh.shape and key.shape[2] % mesh.shape["tensor"] == 0
    heads = P(rows or None, None, "tensor" if fits else None, None)
    mapped = jax.shard_map(
        _splash_local,
        in_specs=(heads, heads, heads, P(rows or None, None)),
        out_specs=heads,
        check_vma=False,
    )
    return mapped(query, key, value, mask)


def _block(length: int) -> int:
    return next(size for size in (512, 256, _LANES) if length % size == 0)


def _splash_local(query: Array, key: Array, value: Array, mask: Array, *, interpret: bool = False) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, length, heads, width = query.shape
    block = _block(length)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    kernel = kernels.make_splash_mha(
        causal, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    # Tokens see only their own segment, and hidden ones are a segment of their own.
    segment = mask.astype(jnp.int32)
    query, key, value = (x.swapaxes(1, 2) for x in (query * width**-0.5, key, value))
    out = jax.vmap(kernel)(query, key, value, kernels.SegmentIds(segment, segment))
    return out.swapaxes(1, 2)


def cache_mask(length: Array, new: int, slots: int, valid: Array | None, batch: int) -> Array:
    """Which cache slots each of `new` queries in slots length ... length+new-1 may see.

    Args:
        length: int32 scalar, slots filled before the call.
        new: number of queries T.
        slots: number of cache slots S.
        valid: [B, S] bool, slots that may be seen at all; None: every one.
        batch: B.

    Returns:
        [B, T, S] bool.
    """
    last = length + jnp.arange(new)[:, None]
    visible = jnp.arange(slots)[None, :] <= last
    visible = jnp.broadcast_to(visible, (batch, new, slots))
    return visible if valid is None else visible & valid[:, None, :].astype(bool)


def kernel_flops(name: str, operands: list[tuple[int, ...]]) -> float | None:
    """FLOPs of a call of the TPU kernel, for plans: it visits the blocks on and below the diagonal.

    Args:
        name: of the call in the compiled program.
        operands: their shapes; the first of the largest is the queries', [B, N, T, H] or [N, T, H].

    Returns:
        None for another kernel.
    """
    products = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
    count = next((n for kind, n in products.items() if name.startswith(kind)), None)
    if count is None:
        return None
    *rows, length, width = max(operands, key=math.prod)
    return count * 2.0 * math.prod(rows) * width * length * (length + _block(length)) / 2
