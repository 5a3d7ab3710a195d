"""Lists of edits, and what a score says of each."""

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_jax.analysis import _interventions as edit
from opd_jax.analysis._compare import Table
from opd_jax.analysis._pool import Progress
from opd_jax.analysis._trees import depth, distance, groups

EXPERIMENTS = ("scale", "swap", "window", "truncate", "norms", "leave-out")
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
PERCENTS = (1.0, 5.0, 10.0, 25.0, 50.0)
BETAS = (0.0, 0.5, 0.8, 1.0, 1.2)
HALF_WIDTH = 8
"""The paper's: windows of 17 layers."""

Score = Callable[[Any, int], Any]
"""`score(params, repeat)` -> a number, or [n]: one for each prompt, of the same prompts at every call."""
Known = MutableMapping[tuple[str, int], tuple[Sequence[float], float]]


@dataclass(frozen=True)
class Edit:
    """One point of an experiment.

    Attributes:
        experiment: of `EXPERIMENTS`.
        setting: what is special about this one, such as "alpha=0.5".
        content: equal for edits of equal weights, whatever they are called.
        make: gives the edited weights, a tree of numpy arrays.
    """

    experiment: str
    setting: str
    content: str
    make: Callable[[], Any]

    @property
    def name(self) -> str:
        """`experiment/setting`."""
        return f"{self.experiment}/{self.setting}"


def edits(
    base: Any,
    tuned: Any,
    *,
    early: Any = None,
    experiments: Sequence[str] | None = None,
    alphas: Sequence[float] = ALPHAS,
    half_width: int = HALF_WIDTH,
    percents: Sequence[float] = PERCENTS,
    betas: Sequence[float] = BETAS,
) -> list[Edit]:
    """The edits that some experiments consist of; nothing is computed before their `make` is called.

    - "scale": "alpha=A".
    - "swap": "embeddings=base", and "embedding=base", "head=base" where the two are not tied.
    - "window": "mlp=L" and "attention=L", the update of the layers around L alone.
    - "truncate": "top=P%", "bottom=P%", both also with ",matched" norms; "top=0%" is the control.
    - "norms": "beta=B", from the early checkpoint.
    - "leave-out": "without=MODULE", for each of `groups`.

    All but "scale" begin with the settings "base" and "tuned" ("norms" also with "early"), to compare with.

    Args:
        base: see `scale`.
        tuned: see `scale`.
        early: weights of an early checkpoint, for "norms" alone.
        experiments: names; None: all, "norms" only with `early`.
        alphas: see `scale`.
        half_width: see `window`.
        percents: see `truncate`; from above 0.
        betas: see `match_norms`.

    Raises:
        ValueError: if an experiment is unknown or has nothing to try, or a value is out of range.

    Example:
        >>> import numpy as np
        >>> tree = lambda x: {"layers": {"0": {"up": np.full((2, 2), x, np.float32)}}}
        >>> [each.name for each in edits(tree(0), tree(1), experiments=["scale"], alphas=[0, 0.5])]
        ['scale/alpha=0', 'scale/alpha=0.5']
    """
    chosen = _experiments(experiments, early)
    makers = {
        "scale": lambda: _scale(base, tuned, _numbers("alphas", alphas)),
        "swap": lambda: _swap(base, tuned),
        "window": lambda: _window(base, tuned, half_width),
        "truncate": lambda: _truncate(base, tuned, _numbers("percents", percents)),
        "norms": lambda: _norms(base, early, tuned, _numbers("betas", betas)),
        "leave-out": lambda: _leave_out(base, tuned),
    }
    references = [("base", "base", lambda: edit.scale(base, tuned, 0))]
    references += [("tuned", "tuned", lambda: edit.scale(base, tuned, 1))]
    found = []
    for name in chosen:
        own = [] if name == "scale" else list(references)
        if name == "norms":
            own.append(("early", "early", lambda: edit.match_norms(base, early, tuned, 0)))
        found += [Edit(name, *each) for each in own + makers[name]()]
    return found


def intervene(
    base: Any,
    wanted: Sequence[Edit],
    score: Score,
    *,
    repeats: int = 1,
    known: Known | None = None,
    progress: Progress | None = None,
) -> dict[str, Table]:
    """Scores edits one after the other; one edited model exists at a time.

    A row has `score`, the mean over prompts and repeats, and `error`, its standard error over prompts: the
    repeats of a prompt are averaged first, since they say nothing about other prompts. For a score that is a
    single number it is the standard error over repeats. `norm` is ||W - W_base||_F of the edited weights.

    Args:
        base: see `scale`.
        wanted: from `edits`, of the same base.
        score: see `Score`; a repeat should draw with random numbers of its own, the same for every edit.
        repeats: evaluations of each edit, at least 1.
        known: by (content, repeat): (scores, norm) of evaluations that need not be made again; new ones are
            put in as they are made. A mapping that also writes them down makes this resumable.
        progress: called with ("evaluating", evaluations done, evaluations).

    Returns:
        By experiment, rows {experiment, setting, score, error, norm}.

    Raises:
        ValueError: if there are no repeats, or a score's shape changes.

    Example:
        >>> import numpy as np
        >>> tree = lambda x: {"layers": {"0": {"up": np.full((2, 2), x, np.float32)}}}
        >>> wanted = edits(tree(0), tree(1), experiments=["scale"], alphas=[0.5])
        >>> intervene(tree(0), wanted, lambda params, repeat: params["layers"]["0"]["up"].sum())["scale"]
        [{'experiment': 'scale', 'setting': 'alpha=0.5', 'score': 2.0, 'error': nan, 'norm': 1.0}]
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    known = {} if known is None else known
    _evaluate(base, wanted, score, repeats, known, progress)
    tables: dict[str, Table] = {}
    for each in wanted:
        kept = [known[each.content, repeat] for repeat in range(repeats)]
        mean, error = _summary([values for values, _ in kept], each.name)
        row = {"experiment": each.experiment, "setting": each.setting, "score": mean, "error": error}
        tables.setdefault(each.experiment, []).append(row | {"norm": kept[0][1]})
    return tables


def _evaluate(base: Any, wanted: Sequence[Edit], score: Score, repeats: int, known: Known, progress) -> None:
    """Puts what is missing into `known`; edits of equal content are made and scored once."""
    makers = {each.content: each.make for each in reversed(wanted)}
    todo = {
        c: [r for r in range(repeats) if (c, r) not in known]
        for c in dict.fromkeys(e.content for e in wanted)
    }
    total, done = sum(map(len, todo.values())), 0
    for content, missing in todo.items():
        params = makers[content]() if missing else None
        size = distance(base, params) if missing else 0.0
        for repeat in missing:
            if progress:
                progress("evaluating", done, total)
            values = np.atleast_1d(np.asarray(score(params, repeat), np.float64))
            known[content, repeat] = (values.tolist(), size)
            done += 1
        params = None  # before the next is made
    if progress and total:
        progress("evaluating", done, total)


def _summary(values: list[Sequence[float]], name: str) -> tuple[float, float]:
    """The mean and its standard error, of `repeats` lists of one value a prompt."""
    if len({len(each) for each in values}) > 1:
        raise ValueError(
            f"{name}: the score gave {sorted({len(v) for v in values})} values, not always as many"
        )
    table = np.array(values)
    each = table.mean(0) if table.shape[1] > 1 else table[:, 0]
    error = each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return float(each.mean()), float(error)


def _experiments(names: Sequence[str] | None, early: Any) -> list[str]:
    if names is None:
        return [name for name in EXPERIMENTS if name != "norms" or early is not None]
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise ValueError(f"there is no experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    if not names:
        raise ValueError(f"name an experiment at least; there are {', '.join(EXPERIMENTS)}")
    if "norms" in names and early is None:
        raise ValueError("the experiment norms needs an early checkpoint, whose updates it makes longer")
    return names


def _numbers(name: str, values: Sequence[float]) -> list[float]:
    values = list(values)
    if not values:
        raise ValueError(f"{name} is empty; give at least one number")
    return list(dict.fromkeys(edit._finite(f"each of {name}", value) for value in values))


def _scale(base: Any, tuned: Any, alphas: list[float]) -> list[tuple]:
    ends = {0.0: "base", 1.0: "tuned"}
    return [
        (f"alpha={a:g}", ends.get(a, f"scale {a!r}"), lambda a=a: edit.scale(base, tuned, a)) for a in alphas
    ]


def _swap(base: Any, tuned: Any) -> list[tuple]:
    present = [name for name in edit.EMBEDDINGS if name in groups(base)]
    if not present:
        raise ValueError("swap: no tensor's name is that of an embedding, such as model.embed_tokens.weight")
    sets = [tuple(present)] + [(name,) for name in present if len(present) > 1]
    names = ["embeddings", *(parts[0] for parts in sets[1:])]
    return [
        (f"{name}=base", f"without {' '.join(parts)}", lambda p=parts: edit.swap(base, tuned, p))
        for name, parts in zip(names, sets, strict=True)
    ]


def _window(base: Any, tuned: Any, half_width: int) -> list[tuple]:
    found, count = [], depth(base)
    for kind in ("mlp", "attention"):
        for centre in range(count):
            layers = edit.window(centre, half_width, count)
            make = lambda k=kind, w=layers: edit.inject(base, tuned, w, k)  # noqa: E731
            found.append((f"{kind}={centre}", f"inject {kind} {layers.start}..{layers.stop - 1}", make))
    return found


def _truncate(base: Any, tuned: Any, percents: list[float]) -> list[tuple]:
    if bad := [p for p in percents if not 0 < p <= 100]:
        raise ValueError(f"percents must be above 0 and at most 100, got {bad[0]:g}")
    factors, found = edit.Factors(), []
    for end, percent, matched in [("top", 0.0, False)] + [
        (end, p, matched) for end in ("top", "bottom") for matched in (False, True) for p in percents
    ]:
        setting = f"{end}={percent:g}%" + ",matched" * matched
        keywords = {end: percent, "match_norm": matched, "factors": factors}
        make = lambda k=keywords: edit.truncate(base, tuned, **k)  # noqa: E731
        found.append((setting, f"truncate {end} {percent!r}" + " matched" * matched, make))
    return found


def _norms(base: Any, early: Any, final: Any, betas: list[float]) -> list[tuple]:
    return [
        (
            f"beta={b:g}",
            "early" if b == 0 else f"norms {b!r}",
            lambda b=b: edit.match_norms(base, early, final, b),
        )
        for b in betas
    ]


def _leave_out(base: Any, tuned: Any) -> list[tuple]:
    return [
        (f"without={name}", f"without {name}", lambda n=name: edit.leave_out(base, tuned, n))
        for name in groups(base)
    ]
