"""Draws the next token: temperature, top-k, top-p, min-p, and the log-prob of what was drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_BLOCKS = 256


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The law that tokens are drawn from, given the model's logits.

    Applied in this order, as in `transformers`: temperature, then top-k, top-p, min-p, each on what the
    one before left. The defaults sample from the model itself.

    Args:
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: keeps the k most likely tokens (more on ties); 0 keeps all.
        top_p: keeps the smallest set of most likely tokens whose mass reaches p (more on ties).
        min_p: keeps tokens at least `min_p` times as likely as the most likely one.

    Raises:
        ValueError: if a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not 0 <= self.temperature < np.inf:
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if not (isinstance(self.top_k, int) and self.top_k >= 0):
            raise ValueError(f"top_k must be an integer >= 0 (0 keeps all), got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")


def truncate(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the sampled law: tempered, and -inf where truncated. [B, V] -> [B, V] float32.

    `sampling.temperature` must not be 0.
    """
    logits = logits.astype(jnp.float32) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampling.top_p < 1:
        logits = jnp.where(_in_nucleus(jax.nn.softmax(logits), sampling.top_p), logits, -jnp.inf)
    if sampling.min_p > 0:
        floor = logits.max(-1, keepdims=True) + np.log(sampling.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits


def _in_nucleus(probs: jax.Array, top_p: float) -> jax.Array:
    """Whether each token is in the smallest set of most likely tokens of mass >= top_p.

    Bisects the threshold on the bit patterns of the probabilities (non-negative floats order as their
    bits do): 31 masked sums instead of a sort of the vocabulary, which costs ten times as much.
    """
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # mass(bits >= low) >= top_p > mass(bits >= high)
        middle = low + (high - low) // 2
        enough = jnp.where(bits >= middle, probs, 0.0).sum(-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros_like(bits[..., :1])
    high = bits.max(-1, keepdims=True) + 1
    threshold, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return bits >= threshold


def sample(logits: ArrayLike, keys: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token a row.

    Args:
        logits: [B, V].
        keys: one PRNG key a row, [B]; the draw of a row depends on its logits and its key alone.
        sampling: the law.

    Returns:
        tokens [B] int32, their natural log-probs under softmax(logits) [B] float32, and under the law
        actually sampled [B] float32 (0 when greedy).
    """
    logits = jnp.asarray(logits).astype(jnp.float32)
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return tokens, _log_prob(logits, tokens), jnp.zeros(tokens.shape, jnp.float32)
    law = truncate(logits, sampling)
    tokens = _draw(law, keys)
    log_probs = _log_prob(logits, tokens)
    if sampling == Sampling():
        return tokens, log_probs, log_probs
    return tokens, log_probs, _log_prob(law, tokens)


def _log_prob(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Inverts the cumulative distribution in two levels, first over blocks, then inside the block drawn.

    Far cheaper than one Gumbel variate a token (`jax.random.categorical`); two uniforms instead of one
    keep probabilities below 2^-23 reachable.
    """
    batch, vocab = logits.shape
    width = -(-vocab // _BLOCKS)
    mass = jnp.exp(logits - logits.max(-1, keepdims=True))
    mass = jnp.pad(mass, ((0, 0), (0, width * _BLOCKS - vocab))).reshape(batch, _BLOCKS, width)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _invert(mass.sum(-1), uniform[:, 0])
    inside = _invert(jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0], uniform[:, 1])
    token = (block * width + inside).astype(jnp.int32)
    return jnp.minimum(token, vocab - 1)  # logits that are not finite select the padding


def _invert(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """First index whose cumulative mass exceeds uniform * total, never one of mass 0. [B, W], [B] -> [B]"""
    cumulative = jnp.cumsum(mass, axis=-1)
    positive = mass > 0  # rounding of the sums must not select a token that the law excludes
    beyond = positive & (cumulative > uniform[:, None] * cumulative[:, -1:])
    last = mass.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    return jnp.where(beyond.any(-1), jnp.argmax(beyond, axis=-1), last)
