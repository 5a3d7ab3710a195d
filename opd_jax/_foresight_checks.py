"""What can be said of a config's `foresight` section."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opd_jax.config import Config

_TRACK = ("foresight.track.every", "foresight.track.of")
_SEARCH = tuple(
    f"foresight.extrapolate.{key}"
    for key in ("factors", "rule", "score", "prompts", "anchor", "moves", "max_kl", "reset_moments")
)
_ALLOCATE = tuple(f"foresight.allocate.{key}" for key in ("mode", "measure"))
_PROJECT = tuple(f"foresight.project.{key}" for key in ("sides", "refresh", "residual", "stop_after_lock_in"))


def used(config: "Config") -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """(keys, whether this config uses them, why not), as `_objective_checks.used`."""
    part = config.foresight
    extrapolate, off = part.extrapolate, "foresight.extrapolate.schedule is off"
    searches = extrapolate.schedule != "off"
    yield _TRACK, part.track.rank > 0, "foresight.track.rank is 0"
    yield _SEARCH, searches, off
    every, listed = (extrapolate.schedule == kind for kind in ("every", "steps"))
    why = f"foresight.extrapolate.schedule is {extrapolate.schedule}"
    yield ("foresight.extrapolate.every",), every, why
    yield ("foresight.extrapolate.steps",), listed, why
    yield ("foresight.extrapolate.margin",), searches and extrapolate.rule == "margin", "the rule has none"
    yield _ALLOCATE, part.allocate.steps > 0, "foresight.allocate.steps is 0"
    yield ("foresight.allocate.fraction",), part.allocate.mode == "freeze", "nothing is frozen"
    yield _PROJECT, part.project.rank > 0, "foresight.project.rank is 0"
    yield ("evaluation.target",), config.evaluation.prompts > 0, "evaluation.prompts is 0"


def problems(config: "Config") -> Iterator[str]:
    """All that is wrong with the values, whose types are right already."""
    yield from _watching(config)
    if config.foresight.extrapolate.schedule != "off":
        yield from _extrapolate(config)
    target = config.evaluation.target
    if target is not None and not 0 < target <= 1:
        yield f"evaluation.target is {target}; it is an accuracy above 0 and at most 1"


def _watching(config: "Config") -> Iterator[str]:
    track, allocate, project = (getattr(config.foresight, n) for n in ("track", "allocate", "project"))
    for key, value, low in (
        ("track.rank", track.rank, 0),
        ("track.every", track.every, 1),
        ("allocate.steps", allocate.steps, 0),
        ("project.rank", project.rank, 0),
        ("project.refresh", project.refresh, 1),
    ):
        if value < low:
            yield f"foresight.{key} is {value}; it must be at least {low}"
    if 0 < config.steps < allocate.steps:
        yield (
            f"foresight.allocate.steps is {allocate.steps}, but the run has {config.steps} steps: what is "
            "measured would come to nothing"
        )
    if not 0 < allocate.fraction < 1:
        yield f"foresight.allocate.fraction is {allocate.fraction}; it must be above 0 and below 1"
    if allocate.steps and allocate.mode == "freeze" and project.rank:
        yield "foresight.allocate.mode is freeze, which does not go with foresight.project"
    lock = project.stop_after_lock_in
    if lock is not None and not 0 < lock <= 1:
        yield f"foresight.project.stop_after_lock_in is {lock}; it is an overlap above 0 and at most 1"


def _extrapolate(config: "Config") -> Iterator[str]:
    key, extrapolate = "foresight.extrapolate", config.foresight.extrapolate
    if extrapolate.schedule == "every" and extrapolate.every < 1:
        yield f"{key}.every is {extrapolate.every}; it must be at least 1"
    if extrapolate.schedule == "steps" and (not extrapolate.steps or min(extrapolate.steps) < 1):
        yield f"{key}.steps is {list(extrapolate.steps)}; give the steps to search after, each at least 1"
    if not extrapolate.factors or not all(0 < f < float("inf") for f in extrapolate.factors):
        yield f"{key}.factors is {list(extrapolate.factors)}; give positive numbers"
    if not 0 <= extrapolate.margin < float("inf"):
        yield f"{key}.margin is {extrapolate.margin}; it must be at least 0 standard errors"
    least = 2 if extrapolate.rule == "margin" else 1
    if extrapolate.prompts < least:
        yield f"{key}.prompts is {extrapolate.prompts}; rule {extrapolate.rule} needs at least {least}"
    if extrapolate.max_kl is not None and not extrapolate.max_kl > 0:
        yield f"{key}.max_kl is {extrapolate.max_kl}; it must be above 0 nats"
    teacher = config.teacher
    kinds = (("ema", teacher.ema is not None), ("align", teacher.align), ("cache", teacher.cache is not None))
    reason = next((f"teacher.{name} is set" for name, given in kinds if given), None)
    if config.objective != "opd":
        reason = f"objective {config.objective} does not distil"
    if extrapolate.score == "kl" and reason:
        yield f"{key}.score is kl, but {reason}: no fixed teacher scores the rollouts; set score: accuracy"
