"""Everything a run needs, checked and loaded in an order that fails early."""

import dataclasses
import functools
import os
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from opd_jax import models, tasks
from opd_jax.config import Config, ReferenceConfig, TeacherConfig
from opd_jax.parallel import make_mesh, together
from opd_jax.training._layout import check_rows, check_split
from opd_jax.training._logging import Display
from opd_jax.training._objectives import make_objective, weight_bounds
from opd_jax.training._optimizer import carried, init_optimizer, make_optimizer, optimizer_shardings
from opd_jax.training._pair import check_pair, check_width
from opd_jax.training._retokenize import Retokenize
from opd_jax.training._scoring import Scorer
from opd_jax.training._step import State, make_update
from opd_jax.training._teacher_cache import TeacherCache
from opd_jax.training._teacher_mesh import split_devices


@dataclasses.dataclass(frozen=True)
class Setup:
    """What does not change during a run."""

    config: Config
    mesh: Mesh
    tokenizer: Any
    stops: tuple[int, ...]
    prompts: tasks.Prompts
    held_out: tasks.Prompts | None
    graphdef: nnx.GraphDef
    """The student's; the loop holds its parameters."""
    frozen: Any
    """Parameters of the student that are not trained, in the computation dtype; None: all are."""
    teacher: models.Decoder | None
    """The teacher, if there is one that does not change."""
    teacher_mesh: Mesh
    """Where it is: on `mesh`, or on one of its own."""
    teacher_of: np.ndarray | None
    """[examples] int32, which of several teachers an example of the data set has."""
    cache: TeacherCache | None
    retokenize: Retokenize | None
    scorer: Scorer
    update: Any
    key: jax.Array

    def model(self, params: Any) -> models.Decoder:
        """The student as it samples and is evaluated, in the computation dtype. Adapters stay apart: rounded
        into bfloat16 weights, the sampler would not be the model that is trained."""
        if self.config.student.dtype != "float32":
            params = _cast(params, self.config.student.dtype)
        return nnx.merge(self.graphdef, *([params] if self.frozen is None else [params, self.frozen]))


@jax.jit(static_argnames="dtype")
def _cast(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda p: p.astype(dtype), params)


def prepare(config: Config, display: Display) -> tuple[Setup, State]:
    """Checks the mesh, the tokenizers and the data, then loads the models.

    Raises:
        ValueError: with what is wrong, before any weight is loaded where it can be known by then.
    """
    apart = config.teacher.mesh is not None
    mesh = None if apart else make_mesh(**dataclasses.asdict(config.mesh))
    mesh, teacher_mesh = split_devices(config) if apart else (mesh, mesh)
    together(lambda: _check_layout(config, mesh, teacher_mesh, display))
    tokenizer, stops, prompts, held_out = together(lambda: read_data(config, mesh, display))
    teacher_of = _teacher_of(config, prompts)
    cache = None
    if config.teacher.cache is not None:
        cache = TeacherCache.open(
            config.teacher.cache,
            tokenizer=tokenizer,
            vocab_size=models.load_config(config.student.path).vocab_size,
            top_k=config.teacher.cache_top_k,
            temperature=config.loss_temperature,
        )
        _check_writer(config, cache)
    retokenize = None
    if config.teacher.align:
        retokenize = Retokenize(config, tokenizer, stops, prompts)

    student, frozen = _student(config, tokenizer, mesh, display)
    graphdef, params = student
    load = functools.partial(load_model, display=display, tokenizer=tokenizer)
    teachers = []
    if config.teacher.ema is None and cache is None:
        named = config.all_teachers.items()
        teachers = [load(_called("teacher", name), each, teacher_mesh) for name, each in named]
    reference = None
    if config.loss == "extrapolated_reverse_kl":
        own = dataclasses.replace(config.reference, path=config.reference.path or config.student.path)
        reference = load("reference", own, mesh)
    scored = [] if config.objective == "sft" or config.teacher.align else teachers
    aligned = teachers[0] if config.teacher.align else None
    vocab_size = None if cache is None else cache.vocab_size
    if reference is not None:
        widths = [model.config.vocab_size for model in (*teachers, reference)]
        vocab_size = min(models.load_config(config.student.path).vocab_size, *widths)
    scorer = Scorer(
        config, graphdef, frozen, scored, aligned=aligned, reference=reference, vocab_size=vocab_size,
        mesh=mesh if apart else None,
    )  # fmt: skip
    optimizer = make_optimizer(config.optimizer, config.foresight)
    average = None if config.teacher.ema is None else jax.tree.map(jnp.copy, params)
    anchor = None if config.foresight.extrapolate.schedule == "off" else jax.tree.map(jnp.copy, params)
    state = State(params, init_optimizer(optimizer, params), average, anchor)
    setup = Setup(
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        stops=stops,
        prompts=prompts,
        held_out=held_out,
        graphdef=graphdef,
        frozen=frozen,
        teacher=teachers[0] if len(teachers) == 1 else None,
        teacher_mesh=teacher_mesh,
        teacher_of=teacher_of,
        cache=cache,
        retokenize=retokenize,
        scorer=scorer,
        update=_update(config, graphdef, scorer, optimizer, jax.tree.map(lambda a: a.sharding, state)),
        key=jax.random.key(config.seed),
    )
    return setup, state


def _check_layout(config: Config, mesh: Mesh, teacher_mesh: Mesh, display: Display) -> None:
    placed = [(config.student.path, mesh), (config.reference.path, mesh)]
    placed += [(each.path, teacher_mesh) for each in config.all_teachers.values()]
    for path, place in placed:
        for notice in check_split(path, place) if path else ():
            display.print(notice)


def still(setup: Setup, state: State, names: Collection[str]) -> tuple[Setup, State]:
    """The run with parameters that stay as they are from now on: they have no gradient and no moments.

    Args:
        setup: the run so far.
        state: its state, arrays or ShapeDtypeStructs.
        names: of the parameters.
    """
    config = setup.config
    optimizer = make_optimizer(config.optimizer, config.foresight, names)
    if isinstance(jax.tree.leaves(state.params)[0], jax.Array):
        opt_state = carried(init_optimizer(optimizer, state.params), state.opt_state)
    else:
        opt_state = jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            jax.eval_shape(optimizer.init, state.params),
            optimizer_shardings(optimizer, state.params),
        )
    state = state._replace(opt_state=opt_state)
    shardings = jax.tree.map(lambda a: a.sharding, state)
    update = _update(config, setup.graphdef, setup.scorer, optimizer, shardings, names)
    return dataclasses.replace(setup, update=update), state


def read_data(
    config: Config, mesh: Mesh, display: Display
) -> tuple[Any, tuple[int, ...], tasks.Prompts, tasks.Prompts | None]:
    """Tokenizer, ids that end a completion, training prompts and held-out prompts; all that can be checked
    of them without weights is checked.

    Raises:
        ValueError: with what is wrong.
    """
    check_rows(config, mesh)
    display.status("reading tokenizers and data")
    tokenizer = models.load_tokenizer(config.student.path)
    stops = models.stop_token_ids(config.student.path, tokenizer)
    for name, each in config.all_teachers.items():
        _check_tokenizers(config, _called("teacher", name), each, tokenizer, stops)
    if config.reference.path:
        _check_tokenizers(config, "reference", config.reference, tokenizer, stops)
    prompts, held_out = _data(config, tokenizer, display)
    _check_lengths(config, prompts, held_out)
    return tokenizer, stops, prompts, held_out


def _student(config: Config, tokenizer: Any, mesh: Mesh, display: Display) -> tuple[tuple, Any]:
    """((graph definition, trained parameters), frozen parameters or None)."""
    adapted = config.lora.rank > 0
    own = dataclasses.replace(config.student, dtype=config.student.dtype if adapted else "float32")
    student = load_model("student", own, mesh, display, tokenizer)
    if not adapted:
        return nnx.split(student), None
    lora = config.lora
    student = models.add_lora(
        student, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, key=jax.random.key(config.seed)
    )
    graphdef, params, frozen = nnx.split(student, models.LoRAParam, ...)
    return (graphdef, params), frozen


def load_model(name: str, model: Any, mesh: Mesh, display: Display, tokenizer: Any) -> models.Decoder:
    """The model of a section of the config, on the mesh."""
    display.status(f"loading the {name} {model.path}")
    loaded = together(
        lambda: models.load(
            model.path,
            dtype=jnp.dtype(model.dtype),
            mesh=mesh,
            attention=model.attention,
            remat=getattr(model, "remat", "none"),
        )
    )
    if not getattr(model, "align", False):
        check_width(name, loaded.config.vocab_size, tokenizer)
    return loaded


def _called(kind: str, name: str) -> str:
    return f"{kind} {name}".strip()


def _check_writer(config: Config, cache: TeacherCache) -> None:
    """Raises ValueError if the cache names another teacher than the config."""
    paths = [os.path.realpath(os.path.expanduser(path)) for path in (cache.teacher, config.teacher.path)]
    if cache.teacher and paths[0] != paths[1]:
        raise ValueError(
            f"{cache.folder} was written by the teacher {cache.teacher}, but teacher.path is "
            f"{config.teacher.path}; set that, or run opd-jax cache-teacher, which finds out whether they "
            "are the same model"
        )


def _check_tokenizers(
    config: Config, name: str, teacher: TeacherConfig | ReferenceConfig, tokenizer: Any, stops: tuple
) -> None:
    theirs = models.load_tokenizer(teacher.path)
    if getattr(teacher, "align", False):
        return
    check_pair(
        tokenizer,
        theirs,
        stops=stops,
        teacher_stops=models.stop_token_ids(teacher.path, theirs),
        chat=config.data.chat == "auto",
        name=name,
    )


def _update(
    config: Config,
    graphdef: nnx.GraphDef,
    scorer: Scorer,
    optimizer: optax.GradientTransformation,
    shardings: State,
    names: Collection[str] = (),
) -> Any:
    return make_update(
        graphdef,
        scorer.graphdefs,
        optimizer,
        make_objective(config),
        weight_bounds=weight_bounds(config),
        dtype=jnp.dtype(config.student.dtype),
        micro_batches=config.micro_batches,
        loss_chunk=config.loss_chunk,
        temperature=config.loss_temperature,
        vocab_size=scorer.vocab_size,
        ema=config.teacher.ema,
        still=names,
        shardings=shardings,
    )


def _teacher_of(config: Config, prompts: tasks.Prompts) -> np.ndarray | None:
    """Which teacher each example of the data set has, by the column `data.teacher`."""
    if not config.teachers:
        return None
    names, column = list(config.teachers), config.data.teacher
    rows = np.zeros(len(prompts.task), np.int32)
    for index in prompts.kept:
        tag = prompts.task[int(index)].metadata.get(column)
        if tag not in names:
            raise ValueError(
                f"example {index} has {column} = {tag!r} (data.teacher), which is none of the teachers "
                f"{', '.join(names)}"
            )
        rows[index] = names.index(tag)
    return rows


def _data(config: Config, tokenizer: Any, display: Display) -> tuple[tasks.Prompts, tasks.Prompts | None]:
    data, evaluation = config.data, config.evaluation
    task = tasks.load(data.source, options=data.options, verifier=data.verifier)
    shared = dict(max_prompt_length=data.max_prompt_length, too_long=data.too_long, chat=data.chat)
    prompts = tasks.Prompts(
        task,
        tokenizer,
        batch_size=config.batch_size // config.samples_per_prompt,
        seed=config.seed,
        context_template=config.teacher.context,
        max_completion_length=config.max_new_tokens if _demonstrated(config) else None,
        progress=display.task("rendering prompts", len(task)),
        **shared,
    )
    _report(display, prompts, len(task), "training")
    if not evaluation.prompts:
        return prompts, None
    source, options = config.evaluation_data
    task = tasks.load(source, options=options, verifier=data.verifier)
    held_out = tasks.Prompts(
        task,
        tokenizer,
        batch_size=evaluation.batch_size,
        context_template=config.teacher.context if evaluation.teacher else None,
        shuffle=False,
        limit=evaluation.prompts,
        **shared,
    )
    _report(display, held_out, min(len(task), evaluation.prompts), "held-out")
    return prompts, held_out


def _demonstrated(config: Config) -> bool:
    """Whether the data set's completions are learned from."""
    off_policy = config.objective == "sft" or (config.objective == "opd" and config.lmbda < 1)
    return off_policy and config.off_policy == "data"


def _report(display: Display, prompts: tasks.Prompts, total: int, kind: str) -> None:
    if prompts.dropped:
        display.print(
            f"{prompts.dropped} of {total} {kind} examples are longer than data.max_prompt_length (or, "
            "for sft, max_new_tokens) and were dropped"
        )


def _check_lengths(config: Config, prompts: tasks.Prompts, held_out: tasks.Prompts | None) -> None:
    """Raises ValueError if a prompt and its completion can be longer than a model's context."""
    longest = max(p.longest for p in (prompts, held_out) if p is not None)
    wanted = [("student", config.student.path, "data.max_prompt_length", longest)]
    for name, teacher in config.all_teachers.items():
        if teacher.align:  # counts in tokens of its own
            continue
        context = prompts.context_longest or longest
        wanted.append((_called("teacher", name), teacher.path, "teacher.context", context))
    if config.reference.path:
        wanted.append(("reference", config.reference.path, "data.max_prompt_length", longest))
    for name, path, key, prompt in wanted:
        limit = models.load_config(path).max_length
        if prompt + config.max_new_tokens > limit:
            raise ValueError(
                f"the longest prompt has {prompt} tokens and max_new_tokens is {config.max_new_tokens}, "
                f"together more than the {limit} positions of the {name} {path}; "
                f"reduce max_new_tokens or {key}"
            )
