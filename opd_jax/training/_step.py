"""The pure steps: scoring by the teacher, and one update of the student.

A row is its prompt with the completion directly behind it, right padded: plain causal attention is then
right, and the hidden state that predicts completion token t stands at position prompt_length - 1 + t.
On each device logits exist for `loss_chunk` tokens at a time, in the forward and in the backward pass.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from opd_jax.models._protocol import LanguageModel, hidden_states
from opd_jax.parallel import platform, row_shards
from opd_jax.training._heads import unembedder
from opd_jax.training._objectives import Completions, Objective, Tokens, statistics
from opd_jax.transforms._matrices import path_name


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
        teacher_rows: [B] int32, which of several teachers a row learns from.
        reference_log_probs: [B, N] float32, of a reference model.
        teacher_completions: [B, M] int32, the completions in the teacher's own tokens.
        spans: [B, N] int32, the piece of text that a token belongs to, -1 = none.
        teacher_spans: [B, M] int32, of the teacher's tokens.
        teacher_log_probs: [B, M] float32, of the teacher's tokens.
        support: [B, N, K] int32, the tokens that a cached teacher knows.
        support_log_probs: [B, N, K + 1] float32, its log-probs of them and of all others together.
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
    teacher_rows: jax.Array | None = None
    reference_log_probs: jax.Array | None = None
    teacher_completions: jax.Array | None = None
    spans: jax.Array | None = None
    teacher_spans: jax.Array | None = None
    teacher_log_probs: jax.Array | None = None
    support: jax.Array | None = None
    support_log_probs: jax.Array | None = None


class State(NamedTuple):
    """What an update changes: everything a run needs besides its config and its step number.

    Attributes:
        params: the trained parameters, float32.
        opt_state: the optimiser's.
        ema: exponential moving average of the parameters, where that is the teacher; or None.
        anchor: parameters at the last search of an extrapolation; or None. An update leaves them.
    """

    params: Any
    opt_state: optax.OptState
    ema: Any = None
    anchor: Any = None


def completion_states(
    model: LanguageModel, prompts: jax.Array, lengths: jax.Array, completions: jax.Array
) -> jax.Array:
    """Hidden states that predict the completion's tokens, [B, N, D] (logits if the model has no others)."""
    slots, count = prompts.shape[1], completions.shape[1]
    width = slots + count
    if platform() == "tpu":  # whole blocks of the attention kernel
        width = -(-width // 128) * 128
    place = jnp.arange(width)[None]
    lengths = lengths[:, None]
    prompt = jnp.take_along_axis(prompts, jnp.minimum(place, slots - 1), axis=1)
    completion = jnp.take_along_axis(completions, jnp.clip(place - lengths, 0, count - 1), axis=1)
    hidden, _ = hidden_states(model, jnp.where(place < lengths, prompt, completion))
    wanted = lengths - 1 + jnp.arange(count)
    return jnp.take_along_axis(hidden, wanted[..., None], axis=1)


def make_score(graphdef: nnx.GraphDef, micro_batches: int, dtype: Any = None) -> Callable[..., jax.Array]:
    """The compiled teacher pass: (params, batch, frozen=None) -> hidden states [B, N, D]; logits exist in the
    loss alone. `dtype` is what the parameters are cast to before, if they are kept in another."""

    @jax.jit
    def score(params, batch: Batch, frozen=None) -> jax.Array:
        model = _merge(graphdef, params, frozen, dtype)
        own = batch.teacher_prompts is None
        rows = (
            batch.prompts if own else batch.teacher_prompts,
            batch.prompt_lengths if own else batch.teacher_prompt_lengths,
            batch.completions,
        )
        hidden = jax.lax.map(lambda row: completion_states(model, *row), _split(rows, micro_batches))
        return _join(hidden)

    return score


def make_log_probs(
    graphdef: nnx.GraphDef, micro_batches: int, loss_chunk: int, vocab_size: int | None = None
) -> Callable[..., jax.Array]:
    """The compiled pass of a model that only judges what was sampled: (params, prompts, prompt_lengths,
    completions) -> log-probs of the completions' tokens [B, N] float32, among the first `vocab_size`."""

    @jax.jit
    def log_probs(params, *rows) -> jax.Array:
        model = nnx.merge(graphdef, params)

        def part(row):
            hidden, ids = completion_states(model, *row), row[-1]
            return _over_tokens(
                lambda tokens: tokens.log_probs(tokens.student),
                model, (), Batch(*row[:2], ids, ids >= 0), hidden, (), loss_chunk, vocab_size,
            )  # fmt: skip

        return _join(jax.lax.map(part, _split(rows, micro_batches)))

    return log_probs


def make_measure(
    graphdef: nnx.GraphDef,
    teacher_graphdefs: Sequence[nnx.GraphDef],
    *,
    dtype: Any = jnp.float32,
    ema: bool = False,
    micro_batches: int = 1,
    loss_chunk: int = 512,
) -> Callable[..., dict[str, jax.Array]]:
    """The compiled look at a batch before its update, for what decides which tokens count: (params,
    teacher_params, batch, teacher_hidden, frozen=None) -> `statistics` and the sampled tokens'
    `student_log_probs` and `teacher_log_probs`, [B, N] float32 each."""

    def part(params, frozen, teacher_params, batch, teacher_hidden):
        student = _merge(graphdef, params, frozen, dtype)
        teachers = _teachers(teacher_graphdefs, teacher_params, frozen, dtype if ema else None)
        hidden = completion_states(student, batch.prompts, batch.prompt_lengths, batch.completions)

        def look(tokens: Tokens):
            log_probs = {"student_log_probs": tokens.log_probs(tokens.student)}
            if tokens.teacher is not None:
                log_probs["teacher_log_probs"] = tokens.log_probs(tokens.teacher)
            return statistics(tokens, (0.0, math.inf)) | log_probs

        return _over_tokens(look, student, teachers, batch, hidden, teacher_hidden, loss_chunk)

    @jax.jit
    def measure(params, teacher_params, batch: Batch, teacher_hidden, frozen=None):
        parts = _split((batch, teacher_hidden), micro_batches)
        return _join(jax.lax.map(lambda piece: part(params, frozen, teacher_params, *piece), parts))

    return measure


def make_update(
    graphdef: nnx.GraphDef,
    teacher_graphdefs: Sequence[nnx.GraphDef],
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    weight_bounds: tuple[float, float] = (0.0, math.inf),
    dtype: Any = jnp.float32,
    micro_batches: int = 1,
    loss_chunk: int = 512,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    ema: float | None = None,
    still: Collection[str] = (),
    shardings: State | None = None,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """The compiled update: (state, teacher_params, batch, teacher_hidden, frozen=None) -> (state, metrics).

    The state is donated. Its gradient is that of the whole batch whatever `micro_batches` and
    `loss_chunk` are. A step whose loss or gradient is not finite changes nothing; `finite` tells.
    `teacher_params` and `teacher_hidden` (from `make_score`) are tuples like `teacher_graphdefs`.

    Args:
        graphdef: the student's, from `nnx.split`.
        teacher_graphdefs: one for each teacher; empty where the objective has none. With several,
            `batch.teacher_rows` says which of them a row learns from.
        optimizer: any optax transformation.
        objective: terms whose per-token losses are summed.
        weight_bounds: importance weights outside are counted as clipped.
        dtype: the parameters are cast to it before use; gradients and optimiser stay float32.
        micro_batches: equal parts, one after the other; divides B.
        loss_chunk: tokens whose logits exist on a device at a time.
        temperature: T, which divides the logits of student and teacher. The gradient of a divergence in the
            student's logits is 1 / T of that of the divergence in logits / T.
        vocab_size: tokens that the distributions range over; None: those that student and teachers share.
        ema: decay of `state.ema`, which is then the only teacher: `teacher_params` is not used.
        still: names of parameters that stay as they are: no gradient of them is computed.
        shardings: of the state, which the new state keeps; without them XLA chooses, and a state laid out
            differently makes the next update compile again.

    Returns:
        The function. Its metrics are float32 scalars: means over the tokens that count, the gradient's and
        the update's global norms, and `finite`.
    """

    transform = optax.with_extra_args_support(optimizer)

    def part_loss(params, frozen, teacher_params, batch: Batch, teacher_hidden):
        student = _merge(graphdef, params, frozen, dtype)
        teachers = _teachers(teacher_graphdefs, teacher_params, frozen, None if ema is None else dtype)
        hidden = completion_states(student, batch.prompts, batch.prompt_lengths, batch.completions)

        def look(tokens: Tokens):
            stats = jax.lax.stop_gradient(statistics(tokens, weight_bounds))
            theirs = None if tokens.teacher is None else tokens.log_probs(tokens.teacher)
            at_temperature = tokens if temperature == 1 else _divide(tokens, temperature)
            terms = {term.name: term.loss(at_temperature) for term in objective if not term.whole}
            return terms, stats, tokens.mask, tokens.log_probs(tokens.student), theirs

        terms, stats, mask, log_probs, theirs = _over_tokens(
            look, student, teachers, batch, hidden, teacher_hidden, loss_chunk, vocab_size
        )
        whole = Completions(
            mask=mask,
            student=log_probs,
            teacher=theirs if batch.teacher_log_probs is None else batch.teacher_log_probs,
            rollout=batch.rollout_log_probs,
            reference=batch.reference_log_probs,
            advantages=batch.advantages,
            spans=batch.spans,
            teacher_spans=batch.teacher_spans,
        )
        terms |= {term.name: term.loss(whole) for term in objective if term.whole}
        totals = {name: jnp.sum(loss * batch.weights) for name, loss in terms.items()}
        sums = {name: jnp.sum(jnp.where(mask, value, 0.0)) for name, value in stats.items()}
        return sum(totals.values()), (totals, sums)

    def update(state: State, teacher_params, batch: Batch, teacher_hidden, frozen=None):
        if ema is not None:
            teacher_params = (state.ema,)
        (loss, (terms, sums)), grads = _summed(
            lambda params, *part: part_loss(params, frozen, teacher_params, *part),
            state.params, _split((batch, teacher_hidden), micro_batches), still,
        )  # fmt: skip
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = transform.update(grads, state.opt_state, state.params, grad=grads)
        params = optax.apply_updates(state.params, updates)
        average = None
        if ema is not None:
            average = jax.tree.map(lambda a, p: ema * a + (1 - ema) * p, state.ema, params)
        new = State(params, opt_state, average, state.anchor)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        count = jnp.maximum(batch.mask.sum(), 1).astype(jnp.float32)
        metrics = {name: total / count for name, total in sums.items()}
        if len(terms) > 1:
            metrics |= {f"loss_{name}": value for name, value in terms.items()}
        metrics |= {
            "loss": loss,
            "gradient_norm": norm,
            "update_norm": optax.tree.norm(updates),
            "finite": finite.astype(jnp.float32),
        }
        return new, metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))


def _summed(loss: Callable, params: Any, parts: tuple, still: Collection[str]) -> tuple[Any, Any]:
    """((loss, auxiliary values), gradient), summed over the parts one after the other; the gradient of what
    stays `still` is not computed, and 0."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in flat]
    moving = [i for i, (path, _) in enumerate(flat) if path_name(path) not in still]

    def placed(values, rest):
        whole = list(rest)
        for i, value in zip(moving, values, strict=True):
            whole[i] = value
        return jax.tree.unflatten(treedef, whole)

    value_and_grad = jax.value_and_grad(lambda moved, *part: loss(placed(moved, leaves), *part), has_aux=True)
    start = [leaves[i] for i in moving]

    def accumulate(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(start, *part)), None

    first = jax.tree.map(lambda a: a[0], parts)
    shapes = jax.eval_shape(value_and_grad, start, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    values, grads = jax.lax.scan(accumulate, zeros, parts)[0]
    return values, placed(grads, jax.tree.map(jnp.zeros_like, leaves))


def _merge(graphdef: nnx.GraphDef, params: Any, frozen: Any, dtype: Any) -> LanguageModel:
    """The model of trained (and frozen) parameters, in the computation dtype."""
    parts = [params] if frozen is None else [params, frozen]
    if dtype is not None:
        parts = jax.tree.map(lambda p: p.astype(dtype), parts)
    return nnx.merge(graphdef, *parts)


def _teachers(graphdefs, params, frozen: Any, dtype: Any) -> list[LanguageModel]:
    """The teachers; with a `dtype`, the only one is an average of the student."""
    frozen = None if dtype is None else frozen
    return [_merge(*pair, frozen, dtype) for pair in zip(graphdefs, params, strict=True)]


def _over_tokens(
    look: Callable[[Tokens], Any],
    student: LanguageModel,
    teachers: Sequence[LanguageModel],
    batch: Batch,
    hidden: jax.Array,
    teacher_hidden: Sequence[jax.Array],
    loss_chunk: int,
    vocab_size: int | None = None,
) -> Any:
    """`look` at all tokens, a chunk at a time: a tree of [B, N] arrays. Logits live as long as their chunk,
    also in the backward pass."""
    heads = [unembedder(model, len(batch.mask)) for model in (student, *teachers)]

    @jax.checkpoint
    def chunk(piece):
        return look(_tokens(heads, vocab_size, *piece))

    fields = dict(ids=batch.completions, mask=batch.mask, rollout_log_probs=batch.rollout_log_probs)
    fields |= dict(support=batch.support, support_log_probs=batch.support_log_probs)
    rows = jax.tree.map(lambda a: jnp.broadcast_to(a[:, None], batch.mask.shape), batch.teacher_rows)
    out = jax.lax.map(chunk, _chunks((hidden, tuple(teacher_hidden), rows, fields), loss_chunk))

    def join(a):  # [chunks, B, n] -> [B, N]
        return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1)[:, : batch.mask.shape[1]]

    return jax.tree.map(join, out)


def _tokens(heads, vocab_size, hidden, teacher_hidden, rows, fields) -> Tokens:
    """The distributions at a chunk's tokens, over the vocabulary that all models share."""
    logits, *theirs = [head(h) for head, h in zip(heads, (hidden, *teacher_hidden), strict=True)]
    theirs = jax.lax.stop_gradient(theirs)
    tokens = Tokens(student=logits, **fields)
    if theirs or vocab_size:
        shared = min(a.shape[-1] for a in (logits, *theirs))  # they may be padded differently
        shared = min(shared, vocab_size or shared)
        teacher = None
        for i, other in enumerate(theirs):
            other = jax.nn.log_softmax(other[..., :shared])
            teacher = other if i == 0 else jnp.where((rows == i)[..., None], other, teacher)
        tokens = tokens._replace(
            student=logits[..., :shared],
            teacher=teacher,
            # No tokenizer has ids beyond, but a sampler may have drawn one.
            mask=tokens.mask & (tokens.ids < shared),
            ids=jnp.minimum(tokens.ids, shared - 1),
        )
    return tokens._replace(student=jax.nn.log_softmax(tokens.student))


def _split(tree: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...], row i to part i % parts, so that rows stay on their device."""

    def split(a):
        return jnp.moveaxis(a.reshape(a.shape[0] // parts, parts, *a.shape[1:]), 1, 0)

    return jax.tree.map(split, tree)


def _divide(tokens: Tokens, temperature: float) -> Tokens:
    """With logits divided by a temperature; log-probs are logits, too."""
    both = dict(student=tokens.student, teacher=tokens.teacher)  # a cached teacher has been divided already
    both = {name: jax.nn.log_softmax(a / temperature) for name, a in both.items() if a is not None}
    return tokens._replace(**both)


def _join(tree: Any) -> Any:
    """The inverse of `_split`."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:]), tree)


def _chunks(tree: Any, loss_chunk: int) -> Any:
    """[B, N, ...] -> [chunks, B, n, ...] with about `loss_chunk` tokens on each device of the mesh; what
    is added does not count."""
    batch, count = jax.tree.leaves(tree)[0].shape[:2]
    width = min(count, math.ceil(loss_chunk * row_shards() / batch))
    chunks = math.ceil(count / width)

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, chunks * width - count)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, chunks, width, *a.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)
