"""Completions of a batch of prompts: prefill, decode until every row has ended."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.models import KVCache
from opd_jax.models._protocol import LanguageModel, hidden_states, unembed
from opd_jax.parallel import any_of, batch_sharding, place, platform, to_host
from opd_jax.rollout._sampling import Sampling, sample

_SEGMENT = 32  # decode steps between two looks of the host (stop strings, progress)
_REASONS = ("length", "eos", "stop")


class Rollout(NamedTuple):
    """Completions of B prompts, N tokens at most.

    Attributes:
        prompts: [B, P] int32, right padded.
        prompt_lengths: [B] int32.
        completions: [B, N] int32, right padded with 0.
        mask: [B, N] bool, 1 = a sampled token, the end-of-sequence token included.
        log_probs: [B, N] float32, natural log-probs of the sampled tokens under the model itself
            (temperature 1, nothing truncated); 0 where the mask is 0.
        sampled_log_probs: [B, N] float32, under the law they were drawn from.
        finish: [B] int8, 0 length, 1 end of sequence, 2 stop string.
    """

    prompts: jax.Array
    prompt_lengths: jax.Array
    completions: jax.Array
    mask: jax.Array
    log_probs: jax.Array
    sampled_log_probs: jax.Array
    finish: jax.Array

    @property
    def lengths(self) -> jax.Array:
        """Sampled tokens a row, [B] int32."""
        return self.mask.sum(-1)

    @property
    def finish_reasons(self) -> list[str]:
        """`length`, `eos` or `stop` of each row."""
        return [_REASONS[f] for f in to_host(self.finish)]


class _State(NamedTuple):
    cache: Any
    step: jax.Array  # scalar: tokens sampled so far, of rows that have not ended
    lengths: jax.Array  # [B] tokens sampled
    finish: jax.Array  # [B] int8, -1 while running
    tokens: jax.Array  # [B, N]
    log_probs: jax.Array  # [B, N]
    sampled_log_probs: jax.Array  # [B, N]


def bucket(length: int, smallest: int = 16) -> int:
    """The power of two that `length` tokens are padded to, at least `smallest`.

    Example:
        >>> bucket(5), bucket(16), bucket(17)
        (16, 16, 32)
    """
    return max(smallest, 1 << max(0, int(length) - 1).bit_length())


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]] | jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    stop_token_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    prompt_lengths: jax.Array | None = None,
    prompt_bucket: int | None = None,
    row_ids: jax.Array | None = None,
    limit: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Rollout:
    """Samples a completion of each prompt.

    Token t of row i is drawn with the key fold_in(fold_in(key, row_ids[i]), t): a completion depends on
    its prompt, its row id and the key alone, not on the batch around it, its padding or the devices.

    Args:
        model: a `Decoder`, or any nnx module with the protocol of `opd_jax.models.LanguageModel`.
        prompts: token ids: B lists of any lengths, or one right-padded [B, P] int32 array together with
            `prompt_lengths` [B].
        key: a PRNG key.
        max_new_tokens: N. Each N compiles its own program, as does each B and each prompt bucket.
        sampling: the law that tokens are drawn from; the default is the model itself.
        stop_token_ids: a completion ends with any of these (it is part of the completion).
        stop_strings: a completion ends with the token that completes any of these; needs `tokenizer`.
        tokenizer: anything with `decode(list of ids) -> str`.
        prompt_lengths: see `prompts`.
        prompt_bucket: P for lists of prompts; the default is the next power of two.
        row_ids: [B] integers; the default is 0 .. B-1.
        limit: stop at so many tokens, below `max_new_tokens`, without compiling anew.
        on_progress: called now and then with the number of tokens sampled a row.

    Returns:
        A `Rollout`.

    Raises:
        ValueError: on an empty prompt or batch, a prompt longer than the bucket, stop strings that are
            empty or without a tokenizer, or `max_new_tokens` or `limit` out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    limit = max_new_tokens if limit is None else limit
    if not 1 <= limit <= max_new_tokens:
        raise ValueError(f"limit must be from 1 to max_new_tokens = {max_new_tokens}, got {limit}")
    if isinstance(stop_strings, str):
        raise ValueError(f"stop_strings must be a sequence of strings, got the string {stop_strings!r}")
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer (anything with decode(ids) -> str)")
    if not all(stop_strings):
        raise ValueError(f"a stop string is empty: {list(stop_strings)}")
    tokens, lengths = _pad(prompts, prompt_lengths, prompt_bucket)
    rows = np.arange(len(lengths)) if row_ids is None else np.asarray(row_ids)
    if rows.shape != lengths.shape:
        raise ValueError(f"row_ids has shape {rows.shape}, expected {lengths.shape}")
    graphdef, params = nnx.split(model)
    tokens, lengths, rows = _place((tokens, lengths, rows.astype(np.uint32)), params)
    stops = np.asarray(sorted(set(stop_token_ids)), np.int32)
    key = _beside(key, params)
    static = dict(graphdef=graphdef, sampling=sampling)
    watched = bool(stop_strings) or on_progress is not None
    with _mesh_of(params):
        state = _prefill(params, tokens, lengths, key, rows, stops, slots=max_new_tokens, **static)
        done = 1
        while done < limit:
            if watched:
                state = _end_at_strings(state, done, stop_strings, tokenizer)
                if on_progress is not None:
                    on_progress(done)
            if watched and not any_of(state.finish < 0):
                break
            done = min(done + _SEGMENT, limit) if watched else limit
            state = _decode(params, state, tokens, lengths, key, rows, stops, done, **static)
        state = _end_at_strings(state, done, stop_strings, tokenizer)
        return _finish(state, tokens, lengths)


def _mesh_of(params: Any):
    """A context in which the parameters' mesh, if they are on one, lays out activations and cache."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        return jax.set_mesh(sharding.mesh)
    return contextlib.nullcontext()


def _pad(prompts, prompt_lengths, prompt_bucket) -> tuple[np.ndarray | jax.Array, np.ndarray]:
    """Prompts as one right-padded [B, P] array, and their lengths [B]."""
    if prompt_lengths is not None:
        if np.ndim(prompts) != 2 or np.shape(prompt_lengths) != np.shape(prompts)[:1]:
            raise ValueError(
                f"with prompt_lengths, prompts must be one [B, P] array; got shapes "
                f"{np.shape(prompts)} and {np.shape(prompt_lengths)}"
            )
        lengths = np.asarray(prompt_lengths, np.int32)
        width = np.shape(prompts)[1]
    else:
        lengths = np.array([len(p) for p in prompts], np.int32)
        width = prompt_bucket or bucket(max(lengths, default=1))
    if not lengths.size:
        raise ValueError("no prompts")
    if lengths.min() < 1:
        raise ValueError(f"prompt {int(lengths.argmin())} is empty; a prompt needs at least one token")
    if lengths.max() > width:
        row = int(lengths.argmax())
        raise ValueError(f"prompt {row} has {lengths[row]} tokens, more than its bucket of {width}")
    if prompt_lengths is not None:
        return prompts, lengths
    tokens = np.zeros((len(lengths), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _place(batch: tuple, params: Any) -> tuple:
    """Puts host arrays where the parameters are: rows spread over the mesh, if they divide."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        sharding = batch_sharding(mesh)
        try:
            sharding.shard_shape(batch[1].shape)
        except ValueError:
            sharding = NamedSharding(mesh, PartitionSpec())
    return place(batch, sharding)


def _beside(key: jax.Array, params: Any) -> jax.Array:
    """The key; one on another mesh than that of the parameters is copied to theirs."""
    sharding = jax.tree.leaves(params)[0].sharding
    ours, theirs = (getattr(each, "mesh", None) for each in (key.sharding, sharding))
    if None in (ours, theirs) or ours == theirs:
        return key
    return jax.device_put(key, NamedSharding(theirs, PartitionSpec()))


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling", "slots"))
def _prefill(params, tokens, lengths, key, rows, stops, *, graphdef, sampling, slots) -> _State:
    model = nnx.merge(graphdef, params)
    batch, width = tokens.shape
    cache = model.init_cache(batch, width + slots)
    hidden, cache = hidden_states(model, tokens, cache=cache, prefill=True)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    state = _State(
        cache=cache,
        step=jnp.zeros((), jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        finish=jnp.full(batch, -1, jnp.int8),
        tokens=jnp.zeros((batch, slots), jnp.int32),
        log_probs=jnp.zeros((batch, slots), jnp.float32),
        sampled_log_probs=jnp.zeros((batch, slots), jnp.float32),
    )
    return _put_away(_append(state, unembed(model, last[:, 0]), key, rows, stops, sampling))


@functools.partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames=("state",))
def _decode(params, state, prompts, prompt_lengths, key, rows, stops, until, *, graphdef, sampling) -> _State:
    """Samples until every row has ended or has `until` tokens."""
    width, slots = prompts.shape[1], prompts.shape[1] + state.tokens.shape[1]
    slot = jnp.arange(slots)
    # A prompt's padding is never seen; slots beyond those filled are the cache's own business.
    visible = (slot < prompt_lengths[:, None]) | (slot >= width)

    def running(state):
        return (state.step < until) & jnp.any(state.finish < 0)

    def one_token(state):
        model = nnx.merge(graphdef, params)
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        positions = prompt_lengths[:, None] + state.step - 1
        filled = visible & (slot < width + state.step)
        hidden, cache = hidden_states(model, last, positions=positions, cache=state.cache, mask=filled)
        state = state._replace(cache=cache)
        return _append(state, unembed(model, hidden[:, 0]), key, rows, stops, sampling)

    return _put_away(jax.lax.while_loop(running, one_token, _taken_out(state)))


def _put_away(state: _State, axes: tuple[int, ...] = (0, 2, 3, 1, 4)) -> _State:
    """With a decoder's cache as it lies on a TPU between programs: [L, S, K, B, H].

    There XLA keeps the cache of a loop that writes one slot after the other with slots outside and rows
    inside, and what goes in and comes out in the order of its axes: any other order costs a copy each way.
    """
    cache = state.cache
    if platform() != "tpu" or not isinstance(cache, KVCache):
        return state
    return state._replace(cache=cache._replace(k=cache.k.transpose(axes), v=cache.v.transpose(axes)))


def _taken_out(state: _State) -> _State:
    """The inverse."""
    return _put_away(state, (0, 3, 1, 2, 4))


def _append(state: _State, logits, key, rows, stops, sampling) -> _State:
    """Draws the next token of every row and writes down those of running rows."""
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), state.step))(rows)
    token, log_prob, sampled = sample(logits, keys, sampling)
    running = state.finish < 0

    def put(array, value):
        value = jnp.where(running, value, 0).astype(array.dtype)
        return jax.lax.dynamic_update_slice_in_dim(array, value[:, None], state.step, axis=1)

    ended = running & jnp.isin(token, stops)
    return state._replace(
        step=state.step + 1,
        lengths=state.lengths + running,
        finish=jnp.where(ended, jnp.int8(1), state.finish),
        tokens=put(state.tokens, token),
        log_probs=put(state.log_probs, log_prob),
        sampled_log_probs=put(state.sampled_log_probs, sampled),
    )


def _end_at_strings(state: _State, done: int, stop_strings, tokenizer) -> _State:
    """Ends rows whose text contains a stop string, at the token that completes it."""
    if not stop_strings:
        return state
    tokens, lengths, finish = map(np.array, to_host((state.tokens, state.lengths, state.finish)))

    def contains(row, count):
        text = tokenizer.decode(tokens[row, :count].tolist())
        return any(s in text for s in stop_strings)

    for row in range(len(lengths)):
        # A row that met its end token in this segment may have met a stop string before it.
        if finish[row] == 2 or not contains(row, lengths[row]):
            continue
        low, high = 0, int(lengths[row])  # contains(low) is False, contains(high) is True
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if contains(row, middle) else (middle, high)
        lengths[row], finish[row] = high, 2
    return state._replace(
        lengths=place(lengths, state.lengths.sharding), finish=place(finish, state.finish.sharding)
    )


@jax.jit
def _finish(state: _State, prompts, prompt_lengths) -> Rollout:
    mask = jnp.arange(state.tokens.shape[1]) < state.lengths[:, None]
    return Rollout(
        prompts=prompts,
        prompt_lengths=prompt_lengths,
        completions=jnp.where(mask, state.tokens, 0),
        mask=mask,
        log_probs=jnp.where(mask, state.log_probs, 0.0),
        sampled_log_probs=jnp.where(mask, state.sampled_log_probs, 0.0),
        finish=jnp.maximum(state.finish, 0),
    )
