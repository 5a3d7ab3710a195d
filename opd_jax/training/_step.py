"""The pure steps: scoring by the teacher, and one update of the student.

A row is its prompt with the completion directly behind it, right padded: plain causal attention is then
right, and the hidden state that predicts completion token t stands at position prompt_length - 1 + t.
Logits exist for `loss_chunk` tokens at a time, in the forward and in the backward pass.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from opd_jax.models._protocol import LanguageModel, hidden_states, unembed
from opd_jax.training._objectives import Objective, Tokens, statistics


class Batch(NamedTuple):
    """Completions to learn from; what an objective does not use is None.

    Attributes:
        prompts: [B, P] int32, right padded.
        prompt_lengths: [B] int32.
        completions: [B, N] int32, right padded.
        mask: [B, N] bool, 1 = counts.
        weights: [B, N] float32, of each token's loss; the loss is their weighted sum over the batch.
        rollout_log_probs: [B, N] float32, from the sampler.
        advantages: [B, N] float32.
        teacher_prompts: [B, P'] int32, where the teacher sees another prompt.
        teacher_prompt_lengths: [B] int32.
    """

    prompts: jax.Array
    prompt_lengths: jax.Array
    completions: jax.Array
    mask: jax.Array
    weights: jax.Array | None = None
    rollout_log_probs: jax.Array | None = None
    advantages: jax.Array | None = None
    teacher_prompts: jax.Array | None = None
    teacher_prompt_lengths: jax.Array | None = None


class State(NamedTuple):
    """What an update changes: everything a run needs besides its config and its step number."""

    params: Any
    opt_state: optax.OptState


def completion_states(
    model: LanguageModel, prompts: jax.Array, lengths: jax.Array, completions: jax.Array
) -> jax.Array:
    """Hidden states that predict the completion's tokens, [B, N, D] (logits if the model has no others)."""
    slots, count = prompts.shape[1], completions.shape[1]
    width = slots + count
    if jax.default_backend() == "tpu":  # whole blocks of the attention kernel
        width = -(-width // 128) * 128
    place = jnp.arange(width)[None]
    lengths = lengths[:, None]
    prompt = jnp.take_along_axis(prompts, jnp.minimum(place, slots - 1), axis=1)
    completion = jnp.take_along_axis(completions, jnp.clip(place - lengths, 0, count - 1), axis=1)
    hidden, _ = hidden_states(model, jnp.where(place < lengths, prompt, completion))
    wanted = lengths - 1 + jnp.arange(count)
    return jnp.take_along_axis(hidden, wanted[..., None], axis=1)


def make_score(graphdef: nnx.GraphDef, micro_batches: int) -> Callable[[Any, Batch], jax.Array]:
    """The compiled teacher pass: (params, batch) -> hidden states [B, N, D]; logits never leave the loss."""

    @jax.jit
    def score(params, batch: Batch) -> jax.Array:
        model = nnx.merge(graphdef, params)
        own = batch.teacher_prompts is None
        rows = (
            batch.prompts if own else batch.teacher_prompts,
            batch.prompt_lengths if own else batch.teacher_prompt_lengths,
            batch.completions,
        )
        hidden = jax.lax.map(lambda row: completion_states(model, *row), _split(rows, micro_batches))
        return jnp.moveaxis(hidden, 0, 1).reshape(-1, *hidden.shape[2:])

    return score


def make_update(
    graphdef: nnx.GraphDef,
    teacher_graphdef: nnx.GraphDef | None,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    weight_bounds: tuple[float, float] = (0.0, math.inf),
    dtype: Any = jnp.float32,
    micro_batches: int = 1,
    loss_chunk: int = 512,
    shardings: State | None = None,
) -> Callable[[State, Any, Batch, jax.Array | None], tuple[State, dict[str, jax.Array]]]:
    """The compiled update: (state, teacher_params, batch, teacher_hidden) -> (state, metrics).

    The state is donated. Its gradient is that of the whole batch whatever `micro_batches` and
    `loss_chunk` are. A step whose loss or gradient is not finite changes nothing; `finite` tells.

    Args:
        graphdef: the student's, from `nnx.split`.
        teacher_graphdef: the teacher's, or None where the objective has none.
        optimizer: any optax transformation.
        objective: per-token loss.
        weight_bounds: importance weights outside are counted as clipped.
        dtype: the parameters are cast to it before use; gradients and optimiser stay float32.
        micro_batches: equal parts, one after the other; divides B.
        loss_chunk: tokens whose logits exist at a time.
        shardings: of the state, which the new state keeps; without them XLA chooses, and a state laid out
            differently makes the next update compile again.

    Returns:
        The function. Its metrics are float32 scalars: means over the tokens that count, the gradient's and
        the update's global norms, and `finite`.
    """

    def part_loss(params, teacher_params, batch: Batch, teacher_hidden):
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        student = nnx.merge(graphdef, params)
        teacher = None if teacher_graphdef is None else nnx.merge(teacher_graphdef, teacher_params)
        hidden = completion_states(student, batch.prompts, batch.prompt_lengths, batch.completions)

        @jax.checkpoint
        def chunk(piece):
            part, hidden, teacher_hidden = piece
            tokens = _tokens(student, hidden, teacher, teacher_hidden, part)
            loss = jnp.sum(objective(tokens) * part.weights)
            stats = jax.lax.stop_gradient(statistics(tokens, weight_bounds))
            return loss, {k: jnp.sum(jnp.where(part.mask, v, 0.0)) for k, v in stats.items()}

        fields = batch._replace(  # per-row fields have been used
            prompts=None, prompt_lengths=None, teacher_prompts=None, teacher_prompt_lengths=None
        )
        pieces = _chunks((fields, hidden, teacher_hidden), loss_chunk)
        losses, sums = jax.lax.map(chunk, pieces)
        return losses.sum(), jax.tree.map(jnp.sum, sums)

    def grad(params, teacher_params, batch, teacher_hidden):
        parts = _split((batch, teacher_hidden), micro_batches)
        value_and_grad = jax.value_and_grad(part_loss, has_aux=True)

        def accumulate(total, part):
            return jax.tree.map(jnp.add, total, value_and_grad(params, teacher_params, *part)), None

        first = jax.tree.map(lambda a: a[0], parts)
        shapes = jax.eval_shape(value_and_grad, params, teacher_params, *first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        ((loss, sums), grads), _ = jax.lax.scan(accumulate, zeros, parts)
        return loss, sums, grads

    def update(state: State, teacher_params, batch: Batch, teacher_hidden):
        loss, sums, grads = grad(state.params, teacher_params, batch, teacher_hidden)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), State(params, opt_state), state)
        count = jnp.maximum(batch.mask.sum(), 1).astype(jnp.float32)
        metrics = {name: total / count for name, total in sums.items()}
        metrics |= {
            "loss": loss,
            "gradient_norm": norm,
            "update_norm": optax.tree.norm(updates),
            "finite": finite.astype(jnp.float32),
        }
        return new, metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def _tokens(student, hidden, teacher, teacher_hidden, batch: Batch) -> Tokens:
    """The distributions at a chunk's tokens, over the vocabulary that both models share."""
    logits = unembed(student, hidden)
    ids, mask, teacher_log_probs = batch.completions, batch.mask, None
    if teacher is not None:
        teacher_logits = jax.lax.stop_gradient(unembed(teacher, teacher_hidden))
        shared = min(logits.shape[-1], teacher_logits.shape[-1])  # they may be padded differently
        logits = logits[..., :shared]
        mask &= ids < shared  # no tokenizer has these ids, but a sampler may have drawn one
        ids = jnp.minimum(ids, shared - 1)
        teacher_log_probs = jax.nn.log_softmax(teacher_logits[..., :shared])
    return Tokens(
        ids=ids,
        mask=mask,
        student=jax.nn.log_softmax(logits),
        teacher=teacher_log_probs,
        rollout_log_probs=batch.rollout_log_probs,
        advantages=batch.advantages,
    )


def _split(tree: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...], row i to part i % parts, so that rows stay on their device."""

    def split(a):
        return jnp.moveaxis(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 1, 0)

    return jax.tree.map(split, tree)


def _chunks(tree: Any, loss_chunk: int) -> Any:
    """[B, N, ...] -> [chunks, B, n, ...] with B n about `loss_chunk`; what is added does not count."""
    batch, count = jax.tree.leaves(tree)[0].shape[:2]
    width = min(count, math.ceil(loss_chunk / batch))
    chunks = math.ceil(count / width)

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, chunks * width - count)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, chunks, width, *a.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)
