"""The programs of a run, from shapes alone: what is planned is what the loop runs."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import models
from opd_jax.config import Config
from opd_jax.parallel import ROWS, batch_sharding, param_shardings, platform
from opd_jax.rollout import Sampling, _generate, bucket
from opd_jax.training._memory import shard_bytes
from opd_jax.training._optimizer import make_optimizer, optimizer_shardings
from opd_jax.training._scoring import Scorer
from opd_jax.training._setup import _update
from opd_jax.training._step import Batch, State

_LOWERED = {"gpu": "cuda"}  # names that lowering has for platforms


class Program(NamedTuple):
    """One compiled program of a step.

    Attributes:
        name: prefill, decode, score (one for each model that scores) or update.
        lower: gives the lowered program; that of decode takes prefill's compiled one, or None.
        arguments: its arrays, as shapes.
        repeats: how often its loop runs whose count is not in it: for decode, the tokens after the first.
        useful: FLOPs of all devices together that the mathematics of a step needs, without recomputation.
        runs: how often a step runs it.
    """

    name: str
    lower: Callable[[Any], Any]
    arguments: Any
    repeats: int
    useful: float
    runs: int = 1

    @property
    def argument_bytes(self) -> int:
        """Of its arrays, on one device."""
        return sum(shard_bytes(leaf) for leaf in jax.tree.leaves(self.arguments) if leaf.sharding)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """All arrays of a run, as shapes with their shardings."""

    config: Config
    mesh: Mesh
    prompt_width: int
    student: models.DecoderConfig
    graphdef: nnx.GraphDef
    frozen: Any
    teachers: tuple[nnx.Module, ...]
    reference: nnx.Module | None
    state: State
    optimizer: Any

    @property
    def resident(self) -> list[Any]:
        """Arrays that live on the devices during the whole step."""
        parts = [self.state, self.frozen, *map(nnx.state, self.teachers)]
        return jax.tree.leaves([*parts, nnx.state(self.reference) if self.reference is not None else None])


def shapes(config: Config, mesh: Mesh, prompt_tokens: int | None = None) -> Shapes:
    """Reads the models' sizes, no weights, and lays everything out on the mesh."""
    if config.teacher.align:
        raise ValueError(
            "plan does not know how long a teacher's own tokens are: teacher.align is not planned"
        )
    if config.teacher.mesh is not None:
        raise ValueError(
            "plan puts student and teacher on the same devices: teacher.mesh is not planned; leave it out, "
            "with --teacher.mesh null"
        )
    longest = prompt_tokens or config.data.max_prompt_length
    student = models.load_config(config.student.path)
    graphdef, params, frozen = _student(config, student, mesh)
    optimizer = make_optimizer(config.optimizer, config.foresight)
    moments = jax.tree.map(
        lambda a, sharding: _give(a.shape, a.dtype, sharding),
        jax.eval_shape(optimizer.init, params),
        optimizer_shardings(optimizer, params),
    )
    teachers: tuple = ()
    if config.teacher.ema is None and config.teacher.cache is None:
        teachers = tuple(_model(each, mesh) for each in config.all_teachers.values())
    reference = None
    if config.loss == "extrapolated_reverse_kl":
        path = config.reference.path or config.student.path
        reference = _model(dataclasses.replace(config.reference, path=path), mesh)
    state = State(
        params,
        moments,
        params if config.teacher.ema is not None else None,
        params if config.foresight.extrapolate.schedule != "off" else None,
    )
    width = bucket(longest)
    return Shapes(config, mesh, width, student, graphdef, frozen, teachers, reference, state, optimizer)


def programs(run: Shapes) -> Iterator[Program]:
    """The programs of one step, in their order: prefill and decode of the student's rollouts, a scoring pass
    for each model that scores, and the update."""
    config = run.config
    scored = [] if config.objective == "sft" else run.teachers
    scorer = Scorer(
        config, run.graphdef, run.frozen, scored, reference=run.reference, vocab_size=_vocab_size(run)
    )
    if config.objective != "sft":
        yield from _rollout(run)
    batch = _batch(run)
    hidden = []
    sizes = [model.config for model in scored] or [run.student]
    for i, score in enumerate(scorer._scores):
        params = run.state.ema if config.teacher.ema is not None else scorer._models[i]
        frozen = run.frozen if config.teacher.ema is not None else None
        name = "score" if len(scorer.graphdefs) == 1 else f"score {list(config.all_teachers)[i]}"
        arguments = (params, batch, frozen)
        useful = _forward(sizes[i], *_size(run), logits=0)
        yield Program(name, lambda _, f=score, a=arguments: _lower(f, *a), arguments, 1, useful)
        kind = _give(
            (config.batch_size, config.max_new_tokens, sizes[i].width),
            scored[i].dtype if scored else jnp.dtype(config.student.dtype),
            batch_sharding(run.mesh),
        )
        hidden.append(kind)
    if run.reference is not None:
        arguments = (nnx.state(run.reference), batch.prompts, batch.prompt_lengths, batch.completions)
        judge = scorer._log_probs["reference"]
        useful = _forward(run.reference.config, *_size(run), logits=config.max_new_tokens)
        yield Program("score reference", lambda _: _lower(judge, *arguments), arguments, 1, useful)
    given = () if config.teacher.ema is not None else tuple(map(nnx.state, scored))
    if scorer.measures:
        arguments = (run.state.params, given or (run.state.ema,), batch, tuple(hidden), run.frozen)
        looked, needed = scorer._measure, _forward(run.student, *_size(run), logits=config.max_new_tokens)
        yield Program("measure", lambda _, a=arguments: _lower(looked, *a), arguments, 1, needed)
    yield _training(run, scorer, batch, given, tuple(hidden))


def _training(run: Shapes, scorer: Scorer, batch: Batch, given: tuple, hidden: tuple) -> Program:
    config = run.config
    shardings = jax.tree.map(lambda a: a.sharding, run.state)
    update = _update(config, run.graphdef, scorer, run.optimizer, shardings)
    arguments = (run.state, given, batch, hidden, run.frozen)
    forward = _forward(run.student, *_size(run), logits=config.max_new_tokens)
    # An adapted model's frozen weights have no gradient of their own.
    useful = (2 if run.frozen is not None else 3) * forward
    for each in run.teachers if config.objective != "sft" else ():
        useful += 2 * each.config.width * each.config.vocab_size * config.batch_size * config.max_new_tokens
    return Program("update", lambda _: _lower(update, *arguments), arguments, 1, useful)


def _rollout(run: Shapes) -> Iterator[Program]:
    config, mesh = run.config, run.mesh
    rows, whole = batch_sharding(mesh), NamedSharding(mesh, P())
    count = config.rollout_batch or config.batch_size
    parts = config.batch_size // count
    trained = run.state.params
    params = jax.tree.map(lambda p: _give(p.shape, _sampled_dtype(config, p.dtype), p.sharding), trained)
    if run.frozen is not None:
        params = nnx.merge_state(params, run.frozen)
        graphdef = nnx.graphdef(nnx.merge(run.graphdef, run.state.params, run.frozen))
    else:
        graphdef = run.graphdef
    arguments = (
        params,
        _give((count, run.prompt_width), jnp.int32, rows),
        _give((count,), jnp.int32, rows),
        jax.eval_shape(jax.random.key, 0),
        _give((count,), jnp.uint32, rows),
        _give((2,), jnp.int32, whole),
    )
    static = dict(graphdef=graphdef, sampling=Sampling())
    slots = config.max_new_tokens

    def prefill(_):
        return _lower(_generate._prefill, *arguments, slots=slots, **static)

    def decode(prefilled):
        with jax.set_mesh(mesh):
            shape = jax.eval_shape(lambda *a: _generate._prefill(*a, slots=slots, **static), *arguments)
        places = _state_shardings(shape, mesh) if prefilled is None else prefilled.output_shardings
        state = jax.tree.map(lambda s, place: _give(s.shape, s.dtype, place), shape, places)
        return _lower(_generate._decode, params, state, *arguments[1:], slots, **static)

    width = run.prompt_width
    useful = _forward(run.student, config.batch_size, width, logits=1)
    yield Program("prefill", prefill, arguments, 1, useful, parts)
    # On average half of the new tokens are behind a new one.
    tokens = max(slots - 1, 1)
    useful = tokens * config.batch_size * _token(run.student, width + slots / 2, logits=True)
    yield Program("decode", decode, arguments, tokens, useful, parts)


def _state_shardings(state: Any, mesh: Mesh) -> Any:
    """Where the state of a rollout belongs, if no compiler has said: rows, and the cache's heads."""
    heads = "tensor" if state.cache.k.shape[3] % mesh.shape["tensor"] == 0 else None

    def place(leaf):
        spec = (P(), P(ROWS), P(ROWS), None, None, P(None, ROWS, None, heads))[leaf.ndim]
        return NamedSharding(mesh, spec)

    return jax.tree.map(place, state)


def _student(config: Config, sizes: models.DecoderConfig, mesh: Mesh) -> tuple[Any, Any, Any]:
    own, lora = config.student, config.lora
    dtype = own.dtype if lora.rank else "float32"
    keywords = dict(attention=own.attention, remat=own.remat)
    if not lora.rank:
        graphdef, params = nnx.split(models.abstract(sizes, jnp.dtype(dtype), **keywords))
        return graphdef, _placed(params, mesh), None

    def make():
        base = models.Decoder(sizes, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), **keywords)
        key = jax.random.key(0)
        return models.add_lora(base, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, key=key)

    graphdef, params, frozen = nnx.split(nnx.eval_shape(make), models.LoRAParam, ...)
    return graphdef, _placed(params, mesh), _placed(frozen, mesh)


def _model(section: Any, mesh: Mesh) -> nnx.Module:
    sizes = models.load_config(section.path)
    model = models.abstract(sizes, jnp.dtype(section.dtype), attention=section.attention)
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, _placed(params, mesh))


def _placed(params: Any, mesh: Mesh) -> Any:
    place = param_shardings(params, mesh)
    return jax.tree.map(lambda p, sharding: _give(p.shape, p.dtype, sharding), params, place)


def _give(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _batch(run: Shapes) -> Batch:
    """What `make_batch` gives the update under this config."""
    config, rows = run.config, batch_sharding(run.mesh)
    B, N, width = config.batch_size, config.max_new_tokens, run.prompt_width

    def ints(*shape):
        return _give(shape, jnp.int32, rows)

    floats = _give((B, N), jnp.float32, rows)
    batch = Batch(ints(B, width), ints(B), ints(B, N), _give((B, N), jnp.bool_, rows), floats)
    sampled = config.objective != "sft"
    rewarded = config.objective == "grpo" or config.task_weight
    batch = batch._replace(
        rollout_log_probs=floats if sampled else None, advantages=floats if rewarded else None
    )
    if config.teacher.context is not None:  # no longer than the student's prompt, as far as a plan knows
        batch = batch._replace(teacher_prompts=ints(B, width), teacher_prompt_lengths=ints(B))
    if config.teachers:
        batch = batch._replace(teacher_rows=ints(B))
    if config.loss == "extrapolated_reverse_kl":
        batch = batch._replace(reference_log_probs=floats)
    if config.teacher.cache is not None:
        k = config.teacher.cache_top_k
        cached = _give((B, N, k + 1), jnp.float32, rows)
        batch = batch._replace(rollout_log_probs=None, support=ints(B, N, k), support_log_probs=cached)
    return batch


def _vocab_size(run: Shapes) -> int | None:
    if run.reference is not None:
        sizes = [model.config for model in (*run.teachers, run.reference)]
        return min(run.student.vocab_size, *(each.vocab_size for each in sizes))
    return run.student.vocab_size if run.config.teacher.cache is not None else None


def _sampled_dtype(config: Config, dtype: Any) -> Any:
    return dtype if config.student.dtype == "float32" else jnp.dtype(config.student.dtype)


def _lower(function: Any, *arguments: Any, **keywords: Any) -> Any:
    mesh = next(a.sharding.mesh for a in jax.tree.leaves(arguments) if isinstance(a.sharding, NamedSharding))
    target = platform()
    with jax.set_mesh(mesh):
        return function.trace(*arguments, **keywords).lower(
            lowering_platforms=(_LOWERED.get(target, target),)
        )


def _size(run: Shapes) -> tuple[int, int]:
    return run.config.batch_size, run.prompt_width + run.config.max_new_tokens


def _token(sizes: models.DecoderConfig, seen: float, logits: bool) -> float:
    """FLOPs of one token that sees `seen` others: 2 for each weight, and scores and values of attention."""
    heads = sizes.heads * sizes.head_width
    kv = sizes.kv_heads * sizes.head_width
    weights = sizes.width * (2 * heads + 2 * kv + 3 * sizes.ff_width)
    head = 2 * sizes.width * sizes.vocab_size if logits else 0
    return sizes.layers * (2 * weights + 4 * heads * seen) + head


def _forward(sizes: models.DecoderConfig, rows: int, width: int, logits: int) -> float:
    """FLOPs of a causal pass over `rows` sequences; `logits`: positions a row that have logits."""
    tokens = width * _token(sizes, width / 2, logits=False)
    return rows * (tokens + logits * 2 * sizes.width * sizes.vocab_size)
