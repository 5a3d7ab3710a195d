"""A decoder-only language model (Llama, Qwen2, Qwen3) with stacked, scanned layers."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from opd_jax.models._attention import Implementation, attend, cache_mask, check_implementation
from opd_jax.models._config import DecoderConfig
from opd_jax.models._layers import MLP, Linear, RMSNorm, lookup, lookup_int8, project, value
from opd_jax.models._rope import apply_rope, rope_frequencies, rope_tables
from opd_jax.parallel import ROWS, constrain, platform

Remat = Literal["none", "block", "offload"]
_INPUT = "block_input"


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, and how many slots they fill."""

    k: Array  # [L, B, S, K, H], rotated
    v: Array  # [L, B, S, K, H]
    length: Array  # int32 scalar: slots 0 ... length-1 are filled


class _Call(NamedTuple):
    """What every layer of one forward pass shares."""

    cos: Array  # [B, T, 1, H/2]
    sin: Array  # [B, T, 1, H/2]
    mask: Array | None  # [B, T] or [B, T, S]: True where a key may be seen
    length: Array | None  # where the new keys go in the cache
    causal: bool  # over the new tokens alone, the cache (if any) being empty


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and, if configured, norms on q and k."""

    def __init__(self, config: DecoderConfig, implementation: Implementation, *, rngs, dtype):
        width, head = config.width, config.head_width
        shape, kv_shape = (width, config.heads * head), (width, config.kv_heads * head)
        bias, make = config.attention_bias, dict(rngs=rngs, dtype=dtype)
        self.q = Linear(("embed", "heads"), shape, bias, **make)
        self.k = Linear(("embed", "kv_heads"), kv_shape, bias, **make)
        self.v = Linear(("embed", "kv_heads"), kv_shape, bias, **make)
        self.o = Linear(("heads", "embed"), shape[::-1], config.output_bias, **make)
        norm = (head, config.norm_epsilon)
        self.q_norm = RMSNorm(*norm, dtype=dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(*norm, dtype=dtype) if config.qk_norm else None
        self.head_width = head
        self.implementation = implementation

    def __call__(self, x: Array, call: _Call, cache: tuple[Array, Array] | None, layer: Array):
        heads = (*x.shape[:2], -1, self.head_width)
        q, k, v = (linear(x).reshape(heads) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, call.cos, call.sin), apply_rope(k, call.cos, call.sin)
        if cache is not None:
            start = (layer, 0, call.length, 0, 0)
            cache = tuple(
                lax.dynamic_update_slice(part, new[None].astype(part.dtype), start)
                for part, new in zip(cache, (k, v), strict=True)
            )
            if not call.causal:
                k, v = (lax.dynamic_index_in_dim(part, layer, keepdims=False) for part in cache)
                k, v = k.astype(q.dtype), v.astype(q.dtype)
        out = attend(q, k, v, causal=call.causal, mask=call.mask, implementation=self.implementation)
        return self.o(out.reshape(*x.shape[:2], -1)), cache


class Block(nnx.Module):
    """One pre-norm layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, attention: Implementation, *, rngs, dtype):
        norm = (config.width, config.norm_epsilon)
        self.attention_norm = RMSNorm(*norm, dtype=dtype)
        self.attention = Attention(config, attention, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(*norm, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(self, x: Array, call: _Call, cache: tuple[Array, Array] | None, layer: Array):
        out, cache = self.attention(self.attention_norm(x), call, cache, layer)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """A decoder-only transformer whose layers are stacked [L, ...] and run by one `lax.scan`.

    The computation runs in the dtype of the parameters, with norms, rotary angles, softmax and
    logits in float32. Parameters are `nnx.Param`s whose `axes` metadata names their logical axes.

    Args:
        config: sizes and switches.
        rngs: random numbers for the initial weights (normal, standard deviation 0.02).
        dtype: of the parameters.
        attention: "auto" lets the backend choose; "xla", "cudnn" (GPU), "splash" (TPU) insist.
        remat: what the backward pass finds of the forward pass: "none": all activations; "block": each
            layer's input, the rest is computed again; "offload": the same, inputs in the host's memory.

    Raises:
        ValueError: if the default backend lacks the attention or the offloading asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from opd_jax import models
        >>> config = models.DecoderConfig(
        ...     vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, head_width=4, ff_width=32)
        >>> model = models.Decoder(config, rngs=nnx.Rngs(0))
        >>> model.logits(jnp.ones((1, 5), jnp.int32)).shape
        (1, 5, 32)
    """

    embedding_scale = None  # [V] float32 where the embedding is int8, see `_int8`

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        attention: Implementation = "auto",
        remat: Remat = "none",
    ):
        check_implementation(attention)
        _check_remat(remat)
        self.config = config
        self.attention = attention
        self.remat = remat
        shape = (config.vocab_size, config.width)
        embedding = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param(embedding.astype(dtype), axes=("vocab", "embed"))

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def make_layers(rngs):
            return Block(config, attention, rngs=rngs, dtype=dtype)

        self.layers = make_layers(rngs)
        self.norm = RMSNorm(config.width, config.norm_epsilon, dtype=dtype)
        self.head = (
            None
            if config.tie_embeddings
            else Linear(("embed", "vocab"), shape[::-1], False, rngs=rngs, dtype=dtype)
        )

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        cache: KVCache | None = None,
        mask: Array | None = None,
        *,
        prefill: bool = False,
    ) -> tuple[Array, KVCache | None]:
        """Logits of the next token after each of `tokens`; see `hidden_states`.

        Returns:
            [B, T, V] float32, and the cache with the new tokens in it (None without one).
        """
        hidden, cache = self.hidden_states(tokens, positions, cache, mask, prefill=prefill)
        return self.unembed(hidden), cache

    @property
    def dtype(self) -> jnp.dtype:
        """Of the computation, and of all parameters that are not int8."""
        return self.norm.scale.dtype

    def logits(self, tokens: Array) -> Array:
        """Logits [B, T, V] float32 of a causal pass over `tokens` [B, T]."""
        return self(tokens)[0]

    def hidden_states(
        self,
        tokens: Array,
        positions: Array | None = None,
        cache: KVCache | None = None,
        mask: Array | None = None,
        *,
        prefill: bool = False,
    ) -> tuple[Array, KVCache | None]:
        """Runs every layer and the final norm.

        Args:
            tokens: [B, T] int32.
            positions: [B, T] int32 rotary positions; None: counted from the cache's length.
            cache: keys and values of earlier tokens. The new ones are written to slots length ...
                length+T-1, which must exist: past the end, JAX would overwrite the last slots.
            mask: which keys may be seen, on top of causality: [B, T], or [B, S] over the slots of
                a cache. None: all that causality allows.
            prefill: promises that the cache is empty, so that attention is computed over the T
                new tokens alone, by the causal fast path, instead of over all S slots.

        Returns:
            Hidden states [B, T, D], and the cache after the call (None without one).
        """
        batch, new = tokens.shape
        length = jnp.zeros((), jnp.int32) if cache is None or prefill else cache.length
        if positions is None:
            positions = jnp.broadcast_to(length + jnp.arange(new), (batch, new))
        causal = cache is None or prefill
        if cache is not None:
            slots = cache.k.shape[2]
            if new > slots:
                raise ValueError(f"{new} tokens do not fit a cache of {slots} slots")
            if causal:
                mask = None if mask is None else mask[:, :new]
            else:
                mask = cache_mask(length, new, slots, mask, batch)
        mask = None if mask is None else mask.astype(bool)
        config = self.config
        frequencies = rope_frequencies(config.head_width, config.rope_theta, config.rope_scaling)
        call = _Call(*rope_tables(positions, frequencies), mask, length, causal)
        embedding = constrain(self.embedding[...], "tensor", None)
        if self.embedding_scale is None:
            x = lookup(embedding, tokens)
        else:
            x = lookup_int8(embedding, self.embedding_scale[...], tokens, self.dtype)
        x = constrain(x, ROWS)
        x, pair = self._run_layers(x, call, cache and (cache.k, cache.v))
        if cache is not None:
            cache = KVCache(*(constrain(c, None, ROWS, None, "tensor") for c in pair), length + new)
        return self.norm(x), cache

    def unembed(self, hidden: Array) -> Array:
        """Logits [..., V] float32 of hidden states [..., D]."""
        if self.head is None:
            return project(hidden, self.embedding[...], transposed=True, scale=value(self.embedding_scale))
        return self.head.project(hidden)

    def init_cache(self, batch: int, slots: int, dtype=None) -> KVCache:
        """An empty cache of `slots` tokens for each of `batch` rows.

        Its dtype is that of the parameters unless given; on CPU float32 in any case, which holds
        the same values: XLA:CPU cannot update a bfloat16 array in place.
        """
        c = self.config
        shape = (c.layers, batch, slots, c.kv_heads, c.head_width)
        default = jnp.float32 if platform() == "cpu" else self.dtype
        dtype = dtype or default
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))

    def _run_layers(self, x: Array, call: _Call, cache: tuple[Array, Array] | None):
        graphdef, state = nnx.split(self.layers)

        def body(carry, scanned):
            weights, layer = scanned
            return nnx.merge(graphdef, weights)(carry[0], call, carry[1], layer), None

        if cache is None:
            body = _recomputed(body, self.remat)
        # The cache travels in the carry, updated in place: as scanned input and output it would
        # be copied on every call.
        carry, _ = lax.scan(body, (x, cache), (state, jnp.arange(self.config.layers)))
        return carry


def _check_remat(remat: str) -> None:
    if remat not in get_args(Remat):
        raise ValueError(f"remat is {remat!r}; known: {', '.join(get_args(Remat))}")
    if remat == "offload" and platform() == "cpu":
        raise ValueError("remat is offload, but on a CPU there is no other memory to move to; take block")


def _recomputed(body: Callable, remat: Remat) -> Callable:
    """The body ((x, cache), layer) -> ... of the scan over layers, with activations kept as `remat` says."""
    if remat == "none":
        return body
    policy = None
    if remat == "offload":
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )

    def named(carry, scanned):
        return body((checkpoint_name(carry[0], _INPUT), *carry[1:]), scanned)

    return jax.checkpoint(named, prevent_cse=False, policy=policy)
