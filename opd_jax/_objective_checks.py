"""Which options belong together: objectives, losses, teachers and what counts."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from opd_jax import losses

if TYPE_CHECKING:
    from opd_jax.config import Config

SAMPLED = ("sampled_reverse_kl", "sampled_tail_reverse_kl", "extrapolated_reverse_kl")
# What one of several teachers says besides its path.
_CHOICES = {"dtype": ("float32", "bfloat16", "int8"), "attention": ("auto", "xla", "cudnn", "splash")}
# Arguments that have a key of their own.
_ELSEWHERE = {
    "k": "loss_top_k",
    "support": "loss_support",
    "importance_clip": "importance_clip",
    "temperature": "loss_temperature",
    "lam": "scale",
    "lambda": "scale",
}


def problems(config: "Config") -> Iterator[str]:
    """All that is wrong with the objective of `config`, whose types are right already, and what it needs."""
    yield from _loss_options(config)
    yield from _teacher(config)
    yield from _teacher_mesh(config)
    yield from _teachers(config)
    yield from _completions(config)
    yield from _task(config)
    yield from _counting(config)
    yield from _lora(config)


def used(config: "Config") -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """(keys, whether this config uses them, why not): a value that is not used is a mistake."""
    opd, sft, grpo = (config.objective == name for name in ("opd", "sft", "grpo"))
    loss = config.loss or "reverse_kl"
    divergence, off_policy = opd and loss not in SAMPLED, opd and config.lmbda < 1
    task, measured = grpo or config.task_weight > 0, config.tokens.weights
    ours = f"objective {config.objective} does not use it"
    yield ("loss", "loss_options", "task_weight", "lmbda"), opd, ours
    teacher = opd or grpo or config.off_policy == "teacher"
    yield (
        ("teacher.path", "teacher.dtype", "teacher.attention", "teacher.mesh"),
        teacher,
        "objective sft has no teacher",
    )
    yield ("teacher.context",), opd, f"objective {config.objective} shows its teacher no other prompt"
    yield ("teacher.ema", "teacher.align", "teacher.cache", "teachers", "data.teacher"), opd, ours
    yield ("teacher.cache_top_k",), config.teacher.cache is not None, "teacher.cache is not set"
    yield ("ratio_clip", "kl_coefficient", "dynamic_sampling"), grpo, ours
    yield ("normalise_advantages", "overlong_buffer"), task, "no task reward is used (grpo, or task_weight)"
    yield ("samples_per_prompt",), not sft, ours
    clipped = opd and (not divergence or config.task_weight > 0)
    yield (
        ("importance_clip",),
        clipped,
        (f"loss {loss} sums over the whole vocabulary and has no importance weight" if divergence else ours),
    )
    sampled_law = f"loss {loss} scores the law that was sampled, at temperature 1"
    yield ("loss_temperature",), divergence, sampled_law if opd else ours
    top_k = divergence or (opd and loss == "sampled_tail_reverse_kl")
    yield ("loss_top_k",), top_k, f"loss {loss} looks at the sampled token alone" if opd else ours
    yield ("loss_support",), top_k and config.loss_top_k > 0, "loss_top_k is 0: the whole vocabulary counts"
    yield (
        ("reference.path", "reference.dtype", "reference.attention"),
        opd and loss == "extrapolated_reverse_kl",
        "only loss extrapolated_reverse_kl has a reference",
    )
    yield ("off_policy",), sft or off_policy, "lmbda is 1: the student writes all completions"
    yield ("tokens.weights",), opd, ours
    yield ("tokens.strength",), measured == "prefix_drift", f"tokens.weights is {measured}"
    yield ("tokens.fraction",), measured == "high_entropy", f"tokens.weights is {measured}"
    sampled = not sft and config.lmbda > 0
    written = sampled or ((sft or off_policy) and config.off_policy == "teacher")
    yield ("rollout_batch",), written, "no completion is sampled"
    yield ("tokens.drop_truncated",), written, "no completion is sampled: the data set's are whole"
    stops = config.early_stop
    yield ("early_stop.overlap",), opd, ours
    yield ("early_stop.window",), stops.overlap > 0, "early_stop.overlap is 0"
    yield ("early_stop.horizon",), sampled, "nothing is sampled from the student"
    yield ("early_stop.horizon_steps",), stops.horizon > 0, "early_stop.horizon is 0"
    yield ("lora.alpha", "lora.targets", "lora.save"), config.lora.rank > 0, "lora.rank is 0: no adapters"


def loss_function(name: str) -> Callable:
    """The function of `opd_jax.losses` whose arguments `loss_options` gives."""
    return getattr(losses, "extrapolated_advantages" if name == "extrapolated_reverse_kl" else name)


def _loss_options(config: "Config") -> Iterator[str]:
    if config.objective != "opd":
        return
    name = config.loss or "reverse_kl"
    function, options = loss_function(name), config.loss_options
    parameters = {
        key: each
        for key, each in inspect.signature(function).parameters.items()
        if (each.kind is each.KEYWORD_ONLY or key == "scale")
        and key not in (*_ELSEWHERE, "rollout_log_probs", "where")
    }
    before = True
    for key in options:
        if key not in parameters:
            near = difflib.get_close_matches(key, parameters, n=1)
            hint = f"{name} takes {', '.join(parameters)}" if parameters else f"{name} takes none"
            hint = f"did you mean {near[0]!r}?" if near else hint
            if _ELSEWHERE.get(key) in parameters:
                hint = f"did you mean {_ELSEWHERE[key]!r}?"
            elif key in _ELSEWHERE and _ELSEWHERE[key] != "scale":  # which only ExOPD has
                hint = f"it is the key {_ELSEWHERE[key]}"
            yield f"loss_options.{key}: {name} has no such option; {hint}"
            before = False
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in options]
    if missing:
        yield f"loss_options lacks {', '.join(missing)}, which {name} needs"
    elif before:
        yield from _values(name, function, options)
    if name == "sampled_tail_reverse_kl" and not config.loss_top_k:
        yield "loss_top_k is 0; sampled_tail_reverse_kl is exact on that many tokens and needs at least 1"


def _values(name: str, function: Callable, options: dict[str, Any]) -> Iterator[str]:
    """What the function itself says of the values, tried on the smallest input."""
    if not options:
        return
    two = np.log(np.full((1, 2), 0.5, np.float32))
    arguments = dict(sampled_reverse_kl=3, extrapolated_reverse_kl=3).get(name, 2)
    try:
        function(*[two] * arguments, **options)
    except Exception as error:  # whatever it says of the values
        yield f"loss_options: {name} does not take {options}: {error}"


def _teacher(config: "Config") -> Iterator[str]:
    teacher, student = config.teacher, config.student.path
    if config.objective != "opd":
        return
    kinds = {"ema": teacher.ema is not None, "align": teacher.align, "cache": teacher.cache is not None}
    kinds = [name for name, is_set in kinds.items() if is_set]
    if len(kinds) > 1:
        yield f"teacher.{kinds[0]} and teacher.{kinds[1]} exclude each other"
    if teacher.ema is not None:
        if not 0 <= teacher.ema < 1:
            yield f"teacher.ema is {teacher.ema}; it must be in [0, 1)"
        if teacher.path != student:
            yield (
                f"teacher.ema averages the student, but teacher.path is {teacher.path!r}; "
                f"it must be student.path, {student!r}"
            )
        elif teacher.context is None:
            yield "teacher.ema needs teacher.context: without it the student would learn from itself alone"
        if teacher.dtype != "float32" or teacher.attention != "auto":
            yield "teacher.dtype and teacher.attention are set, but an averaged teacher takes the student's"
        if config.evaluation.teacher:
            yield "evaluation.teacher is true, but with teacher.ema the teacher starts as the student"
        if config.lmbda < 1 and config.off_policy == "teacher":
            yield "off_policy is teacher, but an averaged teacher (teacher.ema) writes no completions"
    if teacher.align:
        if config.loss != "sampled_reverse_kl" or config.loss_options:
            yield (
                "teacher.align compares pieces of text, not distributions over one vocabulary: "
                "set loss: sampled_reverse_kl, without loss_options"
            )
        if config.tokens.weights != "uniform" or config.early_stop.overlap:
            yield "teacher.align goes with tokens.weights: uniform and early_stop.overlap: 0"
        if config.evaluation.teacher:
            yield (
                "evaluation.teacher is true, but with teacher.align the prompts are in the student's tokens; "
                "use `opd-jax evaluate`"
            )
    if teacher.cache is not None:
        if config.lmbda != 0 or config.off_policy != "data":
            yield "teacher.cache knows the data set's completions alone: set lmbda: 0"
        if config.loss in SAMPLED or config.loss_top_k:
            yield "teacher.cache holds top-k log-probs: set loss to a divergence, and loss_top_k to 0"
        if teacher.cache_top_k < 1:
            yield f"teacher.cache_top_k is {teacher.cache_top_k}; it must be at least 1"
        if config.tokens.weights != "uniform" or config.early_stop.overlap or config.evaluation.teacher:
            yield (
                "teacher.cache goes with tokens.weights: uniform, early_stop.overlap: 0 and "
                "evaluation.teacher: false"
            )


def _teacher_mesh(config: "Config") -> Iterator[str]:
    teacher = config.teacher
    if teacher.mesh is None:
        return
    for name, size in vars(teacher.mesh).items():
        if size < 1:
            yield f"teacher.mesh.{name} is {size}; it must be at least 1 (-1 is for `mesh`)"
    no = {
        "teacher.ema": (teacher.ema is not None, "an averaged teacher is where the student is"),
        "teacher.align": (teacher.align, "a teacher with another tokenizer shares the student's mesh"),
        "teacher.cache": (teacher.cache is not None, "with a cache no teacher is loaded beside a student"),
    }
    for name, (is_set, why) in no.items():
        if is_set:
            yield f"teacher.mesh and {name} exclude each other: {why}"


def _teachers(config: "Config") -> Iterator[str]:
    if bool(config.teachers) != (config.data.teacher is not None):
        given, lacking = ("teachers", "data.teacher") if config.teachers else ("data.teacher", "teachers")
        yield f"{given} is set but {lacking} is not: a column of the data names each example's teacher"
    if not config.teachers:
        return
    if config.teacher != type(config.teacher)():
        yield "teacher and teachers are both set; with several teachers, all stand in `teachers`"
    if config.evaluation.teacher:
        yield "evaluation.teacher is true, but there are several; evaluate them with `opd-jax evaluate`"
    if config.lmbda < 1 and config.off_policy == "teacher":
        yield "off_policy is teacher, but there are several"
    known = ("path", *_CHOICES)
    for name, options in config.teachers.items():
        path = options.get("path") if isinstance(options, dict) else None
        if not isinstance(path, str) or not path:
            yield f"teachers.{name} must be a mapping with a path, such as {{path: my/teacher}}"
            continue
        for key in sorted(options.keys() - set(known)):
            yield f"teachers.{name}.{key}: unknown key; a teacher has {', '.join(known)}"
        for key, allowed in _CHOICES.items():
            if options.get(key, allowed[0]) not in allowed:
                yield f"teachers.{name}.{key} is {options[key]!r}; it must be one of {', '.join(allowed)}"


def _completions(config: "Config") -> Iterator[str]:
    if not 0 <= config.lmbda <= 1:
        yield f"lmbda is {config.lmbda}; it is the share of steps that are on-policy, from 0 to 1"
        return
    if config.objective == "sft" and config.off_policy == "teacher" and not config.teacher.path:
        yield "teacher.path is missing: off_policy is teacher, so the teacher writes what sft imitates"
    if config.objective != "opd" or config.lmbda == 1:
        return
    if config.loss in SAMPLED:
        yield (
            f"lmbda is {config.lmbda}, but {config.loss} is an estimate from what the student samples; take "
            "a divergence (reverse_kl, forward_kl, jsd, ...) for completions that it did not write"
        )
    if config.task_weight:
        yield f"lmbda is {config.lmbda}, but task_weight needs what the student itself samples (lmbda: 1)"


def _task(config: "Config") -> Iterator[str]:
    if not 0 <= config.task_weight < math.inf:
        yield f"task_weight is {config.task_weight}; it must be at least 0"
    if config.task_weight > 0 and config.samples_per_prompt < 2:
        yield (
            f"samples_per_prompt is {config.samples_per_prompt}; task_weight compares the completions of a "
            "prompt and needs at least 2"
        )
    if not 0 <= config.overlong_buffer <= config.max_new_tokens:
        yield f"overlong_buffer is {config.overlong_buffer}; it must be from 0 to max_new_tokens"
    if config.dynamic_sampling < 0:
        yield f"dynamic_sampling is {config.dynamic_sampling}; it must be at least 0"


def _counting(config: "Config") -> Iterator[str]:
    tokens, stop = config.tokens, config.early_stop
    if not 0 <= tokens.strength < math.inf:
        yield f"tokens.strength is {tokens.strength}; it must be at least 0"
    if not 0 < tokens.fraction <= 1:
        yield f"tokens.fraction is {tokens.fraction}; it must be above 0 and at most 1"
    options = config.loss_options
    if tokens.weights == "high_entropy" and (options.get("discount") or options.get("level") == "sequence"):
        yield (
            "tokens.weights is high_entropy, which leaves tokens out, but loss_options.discount and level: "
            "sequence need whole completions; take discount 0 and level: token"
        )
    if not 0 <= stop.overlap <= 1:
        yield f"early_stop.overlap is {stop.overlap}; it must be from 0 to 1"
    if stop.window < 1:
        yield f"early_stop.window is {stop.window}; it must be at least 1"
    if stop.horizon and not (1 <= stop.horizon < config.max_new_tokens and stop.horizon_steps >= 1):
        yield (
            f"early_stop.horizon is {stop.horizon} and horizon_steps {stop.horizon_steps}; a horizon must be "
            f"from 1 to max_new_tokens - 1 = {config.max_new_tokens - 1}, and grow over at least 1 step"
        )
    if config.loss_top_k < 0:
        yield f"loss_top_k is {config.loss_top_k}; it must be at least 0"
    if not 0 < config.loss_temperature < math.inf:
        yield f"loss_temperature is {config.loss_temperature}; it must be above 0"


def _lora(config: "Config") -> Iterator[str]:
    lora = config.lora
    if lora.rank < 0:
        yield f"lora.rank is {lora.rank}; it must be at least 0"
    if not 0 < lora.alpha < math.inf:
        yield f"lora.alpha is {lora.alpha}; it must be above 0"
    if not lora.targets:
        yield "lora.targets is empty; name modules, such as [q, v]"
