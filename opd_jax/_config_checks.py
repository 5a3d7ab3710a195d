"""What can be said of a config before any model or data is loaded."""

import difflib
import inspect
import math
import string
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import optax

from opd_jax import _foresight_checks, _objective_checks
from opd_jax._config_io import flatten

if TYPE_CHECKING:
    from opd_jax.config import Config, OptimizerConfig

_ON_LAW = (
    "OPD scores the law it samples from, so training samples at temperature 1 without "
    "truncation; for evaluation see evaluation.temperature"
)
_STEPS = "a run is counted in steps: steps = epochs * prompts * samples_per_prompt / batch_size"
_WHITEN = "advantages of OPD are never normalised: that would erase the teacher's scale and sign"
_SCHEDULE = "it belongs in optimizer.schedule_options, see optimizer.schedule"

# Names that other trainers use, and ours.
_RENAMED = {
    "optimizer.learning_rate": ("lr", "learning_rate", "peak_lr"),
    "optimizer.clip_norm": ("max_grad_norm", "grad_clip", "gradient_clip", "clip_grad"),
    "optimizer.b1 and optimizer.b2": ("betas", "beta1", "beta2"),
    "max_new_tokens": ("max_tokens", "max_completion_length", "max_response_length"),
    "samples_per_prompt": ("n", "group_size", "num_generations", "num_samples"),
    "micro_batches (how many parts)": ("gradient_accumulation_steps", "grad_accum", "accumulate"),
    "kl_coefficient": ("kl_coef", "kl_loss_coef", "beta"),
    "run_dir": ("output_dir", "out_dir"),
    "student.path": ("model", "model_path", "student_path"),
    "teacher.path": ("teacher_model", "teacher_path", "reference", "ref"),
    "data.source": ("dataset", "train_file", "prompts"),
}
# Keys, or `key=value`, that people try: what to say instead of a bare "unknown".
HINTS = {
    **{tried: f"it is {ours}" for ours, names in _RENAMED.items() for tried in names},
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "rollout", "sampling"), _ON_LAW),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), _STEPS),
    **dict.fromkeys(("normalize_advantages", "whiten", "advantage_normalization"), _WHITEN),
    **dict.fromkeys(("warmup", "warmup_steps", "decay_steps"), _SCHEDULE),
    **dict.fromkeys(("lora_rank", "peft"), "it is lora.rank"),
    "student.dtype=int8": "a student is trained, which int8 weights cannot be; teacher, teachers and "
    "reference can be int8",
    "loss=k1": "k1 differentiated directly has a gradient of mean zero, without the teacher; "
    "sampled_reverse_kl takes it as an advantage, which is right",
    "loss=k2": "take sampled_reverse_kl, which also holds one update off-policy",
    "loss=k3": "k3 differentiated directly has the gradient of the forward KL",
}

_AT_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "samples_per_prompt": 1,
    "rollout_batch": 0,
    "micro_batches": 1,
    "max_new_tokens": 1,
    "loss_chunk": 1,
    "max_bad_steps": 1,
    "seed": 0,
    "kl_coefficient": 0,
    "data.max_prompt_length": 1,
    "optimizer.learning_rate": 0,
    "optimizer.weight_decay": 0,
    "evaluation.prompts": 0,
    "evaluation.every": 0,
    "evaluation.samples": 1,
    "evaluation.temperature": 0,
    "evaluation.batch_size": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "logging.every": 1,
    "logging.samples": 0,
}


def problems(config: "Config", default: "Config") -> Iterator[str]:
    """All that is wrong with the values of `config`, whose types are right already."""
    values = flatten(asdict(config))
    yield from _required(config)
    yield from _unused(values, flatten(asdict(default)), config)
    yield from _ranges(values)
    yield from _divisions(config)
    yield from _evaluation(config)
    yield from _schedule(config.optimizer)
    yield from _objective_checks.problems(config)
    yield from _foresight_checks.problems(config)
    if config.teacher.context is not None:
        yield from _template("teacher.context", config.teacher.context)


def _required(config: "Config") -> Iterator[str]:
    student, teacher, coefficient = config.student.path, config.teacher.path, config.kl_coefficient
    if not student:
        yield "student.path is missing: a Hugging Face folder, a hub id, or a GGUF file"
    if not config.data.source:
        yield (
            "data.source is missing: `arithmetic`, `reasoning-gym:NAME`, "
            "`package.module:function`, or a .jsonl or .parquet file"
        )
    if config.objective == "opd":
        if not teacher and not config.teachers:
            yield "teacher.path is missing: objective opd learns from a teacher"
        elif teacher and teacher == student and _nothing_to_learn(config):
            yield (
                f"teacher.path is student.path ({student!r}), so the loss is zero; name another "
                "model, or give the teacher a privileged prompt with teacher.context"
            )
    if config.objective == "grpo":
        if config.samples_per_prompt < 2:
            yield (
                f"samples_per_prompt is {config.samples_per_prompt}; objective grpo compares the "
                "completions of a prompt and needs at least 2"
            )
        if coefficient > 0 and not teacher:
            yield (
                f"teacher.path is missing: kl_coefficient is {coefficient}, and the KL term needs "
                "a reference model"
            )
        if coefficient == 0 and teacher:
            yield (
                f"teacher.path is {teacher!r}, but kl_coefficient is 0, so objective grpo would "
                "never use this reference model; remove it or give a kl_coefficient"
            )


def _nothing_to_learn(config: "Config") -> bool:
    """Whether a teacher that is the student as it starts has nothing to say."""
    other = config.reference.path not in ("", config.student.path)  # the way from there to the teacher
    seen = config.teacher.context is not None or config.teacher.ema is not None
    return not (seen or other or config.task_weight)  # beside a task, the divergence holds the student back


def _unused(values: dict[str, Any], defaults: dict[str, Any], config: "Config") -> Iterator[str]:
    for keys, is_used, why in (*_objective_checks.used(config), *_foresight_checks.used(config)):
        for key in keys:
            given = {k: v for k, v in values.items() if k == key or k.startswith(f"{key}.")}
            if not is_used and any(v != defaults.get(k) for k, v in given.items()):
                yield f"{key} is set but {why}; remove {key}"


def _ranges(values: dict[str, Any]) -> Iterator[str]:
    for key, low in _AT_LEAST.items():
        if not (values[key] >= low and math.isfinite(values[key])):
            yield f"{key} is {values[key]}; it must be at least {low}"
    for key in ("importance_clip", "optimizer.eps", "optimizer.clip_norm"):
        if not values[key] > 0:
            yield f"{key} is {values[key]}; it must be above 0"
    low, high = values["ratio_clip"]
    if not (0 < low <= 1 and high > 0):
        yield f"ratio_clip is {[low, high]}; the low side must be in (0, 1], the high side above 0"
    if values["seed"] >= 2**32:
        yield f"seed is {values['seed']}; it must be below 2**32"
    for key in ("optimizer.b1", "optimizer.b2"):
        if not 0 <= values[key] < 1:
            yield f"{key} is {values[key]}; it must be in [0, 1)"
    axes = {key: size for key, size in values.items() if key.startswith("mesh.")}
    for key, size in axes.items():
        if size < 1 and size != -1:
            yield f"{key} is {size}; it must be at least 1, or -1 for the devices left over"
    left_over = [key for key, size in axes.items() if size == -1]
    if len(left_over) > 1:
        yield f"{' and '.join(left_over)} are -1; only one axis can take the devices left over"


def _divisions(config: "Config") -> Iterator[str]:
    batch = config.batch_size
    for key in ("samples_per_prompt", "rollout_batch", "micro_batches"):
        value = getattr(config, key)
        if value >= 1 and batch >= 1 and batch % value:
            above = -(-batch // value) * value
            yield f"{key} {value} does not divide batch_size {batch}; batch_size {above} would do"


def _evaluation(config: "Config") -> Iterator[str]:
    evaluation = config.evaluation
    if not evaluation.pass_k:
        yield "evaluation.pass_k is empty; give at least [1]"
    for k in evaluation.pass_k:
        if k < 1:
            yield f"evaluation.pass_k holds {k}; each k must be at least 1"
        elif k > evaluation.samples:
            yield (
                f"evaluation.pass_k holds {k} but evaluation.samples is {evaluation.samples}; "
                f"pass@{k} needs at least {k} samples"
            )
    if evaluation.prompts == 0:
        asked = dict(
            source=evaluation.source,
            options=evaluation.options,
            every=evaluation.every,
            samples=evaluation.samples > 1,
            teacher=evaluation.teacher,
        )
        for key in (key for key, value in asked.items() if value):
            yield f"evaluation.{key} is set but evaluation.prompts is 0: nothing would be evaluated"
    if evaluation.teacher and not config.teacher.path:
        yield "evaluation.teacher is true but teacher.path is missing: there is no teacher"
    inherited = evaluation.prompts > 0 and evaluation.source is None and config.data.source
    if inherited and config.evaluation_data[1] == config.data.options:
        yield (
            "evaluation.prompts is set, but source and options are those of the training data: "
            "nothing is held out; give evaluation.options that differ (such as a seed), or an "
            "evaluation.source"
        )


def _template(key: str, template: str) -> Iterator[str]:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        yield f"{key} is not a template ({error}); write {{{{ and }}}} for plain braces"
        return
    for name in names:
        if not name.isidentifier():
            yield (
                f"{key} holds {{{name}}}; fields are plain names such as {{prompt}}; "
                "write {{ and }} for plain braces"
            )


# ---- learning-rate schedules


def _rate_argument(schedule: Callable) -> str | None:
    """Which argument of an optax schedule is the learning rate."""
    parameters = inspect.signature(schedule).parameters
    return next((n for n in ("peak_value", "value", "init_value") if n in parameters), None)


def schedules() -> dict[str, Callable]:
    """The optax schedules that are made of plain values, by name."""
    named = {n: getattr(optax.schedules, n) for n in dir(optax.schedules) if not n.startswith("_")}
    return {n: f for n, f in named.items() if inspect.isfunction(f) and _rate_argument(f)}


def _schedule(optimizer: "OptimizerConfig") -> Iterator[str]:
    known, name = schedules(), optimizer.schedule
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "optax has " + ", ".join(known)
        yield f"optimizer.schedule {name!r} is no optax schedule; {hint}"
        return
    rate, parameters = _rate_argument(known[name]), inspect.signature(known[name]).parameters
    options, before = optimizer.schedule_options, True
    for key in options:
        dotted = f"optimizer.schedule_options.{key}"
        if key == rate:
            yield f"{dotted}: the {rate} of {name} is optimizer.learning_rate; set that"
        elif key not in parameters:
            others = [each for each in parameters if each != rate]
            near = difflib.get_close_matches(key, others, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(others) or 'none'}"
            yield f"{dotted}: {name} has no such argument; {hint}"
        else:
            continue
        before = False
    missing = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and key != rate and key not in options
    ]
    if missing:
        yield f"optimizer.schedule_options lacks {', '.join(missing)}, which {name} needs"
    elif before:
        try:
            make_schedule(optimizer)
        except Exception as error:  # whatever optax says of the values
            yield f"optimizer.schedule_options: {name} does not take these values: {error}"


def make_schedule(optimizer: "OptimizerConfig") -> optax.Schedule:
    """The optax schedule of a valid `OptimizerConfig`: step -> learning rate."""
    schedule = schedules()[optimizer.schedule]
    rate = {_rate_argument(schedule): optimizer.learning_rate}
    return schedule(**rate, **optimizer.schedule_options)
