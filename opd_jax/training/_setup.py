"""Everything a run needs, checked and loaded in an order that fails early."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from opd_jax import models, tasks
from opd_jax.config import Config
from opd_jax.parallel import make_mesh
from opd_jax.training._logging import Display
from opd_jax.training._objectives import make_objective, weight_bounds
from opd_jax.training._optimizer import init_optimizer, make_optimizer
from opd_jax.training._pair import check_pair, check_width
from opd_jax.training._step import State, make_score, make_update


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
    teacher: models.Decoder | None
    update: Any
    score: Any
    key: jax.Array

    def model(self, params: Any) -> models.Decoder:
        """The student as it samples, is evaluated and saved: in the computation dtype."""
        if self.config.student.dtype != "float32":
            params = _cast(params, self.config.student.dtype)
        return nnx.merge(self.graphdef, params)


@jax.jit(static_argnames="dtype")
def _cast(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda p: p.astype(dtype), params)


def prepare(config: Config, display: Display) -> tuple[Setup, State]:
    """Checks the mesh, the tokenizers and the data, then loads the models.

    Raises:
        ValueError: with what is wrong, before any weight is loaded where it can be known by then.
    """
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    _check_rows("batch_size / micro_batches", config.batch_size // config.micro_batches, mesh)
    if config.evaluation.prompts:
        _check_rows("evaluation.batch_size", config.evaluation.batch_size, mesh)
    display.status("reading tokenizers and data")
    tokenizer = models.load_tokenizer(config.student.path)
    stops = models.stop_token_ids(config.student.path, tokenizer)
    teacher_tokenizer = models.load_tokenizer(config.teacher.path) if config.teacher.path else None
    if teacher_tokenizer is not None:
        check_pair(
            tokenizer,
            teacher_tokenizer,
            stops=stops,
            teacher_stops=models.stop_token_ids(config.teacher.path, teacher_tokenizer),
            chat=config.data.chat == "auto",
        )
    prompts, held_out = _data(config, tokenizer, display)
    _check_lengths(config, prompts, held_out)
    display.status(f"loading the student {config.student.path}")
    student = models.load(
        config.student.path,
        dtype=jnp.float32,
        mesh=mesh,
        attention=config.student.attention,
        remat=config.student.remat,
    )
    check_width("student", student.config.vocab_size, tokenizer)
    teacher = None
    if config.teacher.path:
        display.status(f"loading the teacher {config.teacher.path}")
        teacher = models.load(
            config.teacher.path,
            dtype=jnp.dtype(config.teacher.dtype),
            mesh=mesh,
            attention=config.teacher.attention,
        )
        check_width("teacher", teacher.config.vocab_size, tokenizer)
    optimizer = make_optimizer(config.optimizer)
    graphdef, params = nnx.split(student)
    state = State(params, init_optimizer(optimizer, params))
    setup = Setup(
        config=config,
        mesh=mesh,
        tokenizer=tokenizer,
        stops=stops,
        prompts=prompts,
        held_out=held_out,
        graphdef=graphdef,
        teacher=teacher,
        key=jax.random.key(config.seed),
        **_steps(config, graphdef, teacher, optimizer, jax.tree.map(lambda a: a.sharding, state)),
    )
    return setup, state


def _steps(
    config: Config, graphdef, teacher, optimizer: optax.GradientTransformation, shardings: State
) -> dict[str, Any]:
    teacher_graphdef = None if teacher is None else nnx.graphdef(teacher)
    update = make_update(
        graphdef,
        teacher_graphdef,
        optimizer,
        make_objective(config),
        weight_bounds=weight_bounds(config),
        dtype=jnp.dtype(config.student.dtype),
        micro_batches=config.micro_batches,
        loss_chunk=config.loss_chunk,
        shardings=shardings,
    )
    score = None if teacher is None else make_score(teacher_graphdef, config.micro_batches)
    return dict(update=update, score=score)


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
        max_completion_length=config.max_new_tokens if config.objective == "sft" else None,
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


def _report(display: Display, prompts: tasks.Prompts, total: int, kind: str) -> None:
    if prompts.dropped:
        display.print(
            f"{prompts.dropped} of {total} {kind} examples are longer than data.max_prompt_length (or, "
            "for sft, max_new_tokens) and were dropped"
        )


def _check_rows(key: str, rows: int, mesh: Mesh) -> None:
    """Raises ValueError if that many rows cannot be spread over the mesh."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    if rows % (data * fsdp):
        raise ValueError(
            f"{key} is {rows}: so many rows do not spread evenly over mesh.data x mesh.fsdp = {data} x "
            f"{fsdp} = {data * fsdp} devices; make it a multiple of {data * fsdp}"
        )


def _check_lengths(config: Config, prompts: tasks.Prompts, held_out: tasks.Prompts | None) -> None:
    """Raises ValueError if a prompt and its completion can be longer than a model's context."""
    longest = max(p.longest for p in (prompts, held_out) if p is not None)
    wanted = [("student", config.student.path, "data.max_prompt_length", longest)]
    if config.teacher.path:
        context = prompts.context_longest or longest
        wanted.append(("teacher", config.teacher.path, "teacher.context", context))
    for name, path, key, prompt in wanted:
        limit = models.load_config(path).max_length
        if prompt + config.max_new_tokens > limit:
            raise ValueError(
                f"the longest prompt has {prompt} tokens and max_new_tokens is {config.max_new_tokens}, "
                f"together more than the {limit} positions of the {name} {path}; "
                f"reduce max_new_tokens or {key}"
            )
