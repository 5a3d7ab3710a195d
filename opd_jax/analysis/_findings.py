"""What a result says in plain words, with what it cannot say."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opd_jax.analysis._figure import last_changed, mean, modules_of, percent, share
from opd_jax.analysis._figures_geometry import gaussian_ratio
from opd_jax.analysis._figures_trajectory import THRESHOLD, aligned, followed, norm_share
from opd_jax.analysis._geometry import FRACTIONS, Geometry, MatrixGeometry
from opd_jax.analysis._result import Result, Run
from opd_jax.analysis._trajectory import Trajectory

EARLY = 0.1
"""Share of the steps that counts as early: the paper's 10% checkpoint."""
ONE_CHECKPOINT = (
    "One checkpoint cannot tell: give at least two of a run, at different steps (--run NAME=A,B,C)."
)


class Finding(NamedTuple):
    """One thing that matters.

    Attributes:
        question: what a reader asks.
        answers: sentences, one or more a run.
        caveat: what the answer does not say.
        figure: name of the figure that shows it; it may be missing.
    """

    question: str
    answers: tuple[str, ...]
    caveat: str
    figure: str


def findings(result: Result) -> tuple[Finding, ...]:
    """The five findings that open the report, all of them computed from the result's numbers."""
    ways = [(run, way) for run, way, _ in followed(result.runs)]
    changed = [(run, g) for run in result.runs if (g := last_changed(run)) is not None]
    equal = [
        f"{run.name}: no attention or MLP matrix differs from the base's."
        for run in result.runs
        if last_changed(run) is None
    ]
    return (
        Finding(
            "How concentrated is the update?",
            (*(_concentrated(run, g) for run, g in changed), *_more_concentrated(result), *equal),
            "A Gaussian matrix is what an update without any structure would be; ratios depend on the "
            "shape of a matrix, so compare them between runs of one base only.",
            "concentration",
        ),
        Finding(
            "When were the directions locked in?",
            tuple(_locked(run, way) for run, way in ways) or (ONE_CHECKPOINT,),
            "A step is known no finer than the checkpoints. The reference is the last checkpoint given, which "
            "need not be where training would end.",
            "lock_in",
        ),
        Finding(
            "Which layers moved?",
            tuple(_moved(run, g) for run, g in changed) or tuple(equal),
            "Norms say how far weights went, not how much that matters.",
            "layers",
        ),
        Finding(
            "What does it mean for freezing?",
            (*(_freezing(run, g) for run, g in changed), *(_ranks(run) for run, _ in ways)) or tuple(equal),
            "A small update can still be needed: this ranks candidates, and only a run with them frozen shows "
            "what they cost.",
            "modules",
        ),
        Finding(
            "What does it mean for extrapolation?",
            tuple(_extrapolation(run, way) for run, way in ways) or (ONE_CHECKPOINT,),
            "Judged by directions alone; the score of extrapolated weights is not measured here.",
            "direction_distance",
        ),
    )


def _concentrated(run: Run, g: Geometry) -> str:
    records, means = g.select(), g.mean()
    tenth = mean([r.energy[FRACTIONS.index(0.1)] for r in records])
    text = f"{run.name}: the strongest direction of a matrix holds {percent(means['ratio'])} of its update's "
    text += f"norm on average, against {percent(gaussian_ratio(records))} for Gaussian noise of the same shapes; "
    text += f"the leading tenth of the directions holds {percent(tenth)} of the squared norm. The effective "
    text += f"rank is {means['effective_rank']:.0f} of {means['numerical_rank']:.0f}."
    if all(r.numerical_rank <= 100 for r in records):
        return text + " (The paper's top-1% ratio is of one direction here, for matrices this small.)"
    return text + f" The leading 1% hold {percent(means['top1_ratio'])} of the norm."


def _more_concentrated(result: Result) -> list[str]:
    """A sentence for each run that is compared with the first, by s_1 / ||dW||."""
    said = []
    for row in result.comparison.get("measures", ()):
        low, high = (np.nan if row[end] is None else row[end] for end in ("low", "high"))
        if row["measure"] != "ratio" or not np.isfinite([low, high]).all():
            continue
        word = "no clear difference between the two"
        if low > 0 or high < 0:
            word = f"{row['run'] if low > 0 else row['reference']} is the more concentrated"
        said.append(
            f"{row['run']} against {row['reference']}: {word} by s₁/‖ΔW‖ (difference "
            f"{100 * row['difference']:+.1f} points, 95% interval {100 * low:+.1f} to {100 * high:+.1f} over "
            f"{row['matrices']} matrices)."
        )
    return said


def _locked(run: Run, way: Trajectory) -> str:
    along, norms, steps = aligned(way), norm_share(way), way.steps
    k = way.alignment().shape[1]
    if not np.isfinite(along[-1]):
        return f"{run.name}: the last checkpoint has no update, so there is no direction to compare with."
    step = way.lock_in(THRESHOLD)
    at = steps.index(step)
    first = way.lock_in(THRESHOLD, directions=1)
    if at == len(steps) - 1:
        text = f"{run.name}: not before the last checkpoint. At step {steps[-2]} of {steps[-1]}, with "
        text += f"{percent(norms[-2])} of the final norm, the {k} leading directions agreed with the final ones "
        text += f"to |cos| {along[-2]:.2f} on average, below {THRESHOLD}."
    else:
        text = f"{run.name}: from step {step} of {steps[-1]} on ({percent(step / steps[-1])} of the way), the {k} "
        text += f"leading directions stay within |cos| {THRESHOLD} of the final ones on average; the norm was then "
        text += f"at {percent(norms[at])} of the final."
        if at == 0:
            text += " That is the first checkpoint: it may have been sooner."
    return text + f" The first direction alone is there from step {first} on."


def _moved(run: Run, g: Geometry) -> str:
    records = g.select()
    mlp = [r for r in records if r.kind == "mlp"]
    part, size = share(mlp, [r for r in g.records if r.kind in ("attention", "mlp")])
    text = f"{run.name}: MLP matrices hold {percent(part)} of the squared norm, with {percent(size)} of the "
    text += "parameters (attention holds the rest)."
    layers = sorted({r.layer for r in records if r.layer is not None})
    if len(layers) >= 3:
        thirds = [[r for r in records if r.layer in set(part)] for part in np.array_split(layers, 3)]
        shares = [share(third, records)[0] for third in thirds]
        text += " By depth: " + ", ".join(
            f"{percent(value)} in the {name} third"
            for name, value in zip(("first", "middle", "last"), shares, strict=True)
        )
        text += "; even layers would have a third each." if len(layers) % 3 == 0 else "."
    known = [r for r in records if np.isfinite(r.relative)]
    if known:
        top = max(known, key=lambda r: r.relative)
        text += f" Furthest for its size: {top.name}, by {percent(top.relative)} of the base's norm."
    embedded = [r for r in g.records if r.kind == "embedding"]
    if embedded:
        text += f" Embeddings and head moved by {percent(mean([r.relative for r in embedded]))} of theirs."
    return text


def _freezing(run: Run, g: Geometry) -> str:
    """The kinds of matrices that moved least for their size, and what freezing them would leave out."""
    whole = [r for r in g.records if r.kind in ("attention", "mlp")]
    groups = {m: [r for r in whole if r.module == m] for m in modules_of(whole)}
    density = {m: np.divide(*share(records, whole)) for m, records in groups.items()}
    low = [m for m in sorted(groups, key=density.get) if density[m] < 0.5]
    if low:
        part, size = share([r for m in low for r in groups[m]], whole)
        text = f"{run.name}: {_listed(low)} moved least for their size: {percent(part)} of the squared norm with "
        text += f"{percent(size)} of the parameters. They are the first candidates to freeze."
    else:
        least = min(groups, key=density.get)
        text = f"{run.name}: no kind of matrix stands out. The least moved for its size, {least}, still has "
        text += f"{density[least]:.2f} times its share; freezing by kind has no obvious candidate."
    quiet = sorted((r for r in whole), key=lambda r: r.frobenius**2 / (r.shape[0] * r.shape[1]))
    half = _until_half(quiet, whole)
    return text + (
        f" The {len(half)} of {len(whole)} matrices that moved least per parameter, half of the parameters, hold "
        f"{percent(share(half, whole)[0])} of the squared norm."
    )


def _until_half(ordered: Sequence[MatrixGeometry], whole: Sequence[MatrixGeometry]) -> list[MatrixGeometry]:
    """The first of them that make up half of the parameters, or as near as they come without exceeding it."""
    limit, kept, used = sum(r.shape[0] * r.shape[1] for r in whole) / 2, [], 0
    for record in ordered:
        used += record.shape[0] * record.shape[1]
        if used > limit:
            break
        kept.append(record)
    return kept


def _ranks(run: Run) -> str:
    """Whether the first checkpoint ranks matrices as the last one does."""
    records = [r for r in run.trajectory.select() if r.norms[0] > 0]
    first, last = run.trajectory.steps[0], run.trajectory.steps[-1]
    if len(records) < 3:
        return f"{run.name}: too few matrices had moved at step {first} to compare rankings."
    early, late = (np.argsort(np.argsort([r.norms[t] for r in records])) for t in (0, -1))
    rho = float(np.corrcoef(early, late)[0, 1])
    word = "so an early ranking holds" if rho >= 0.8 else "so an early ranking would mislead"
    word = "so an early ranking is a rough guide" if 0.5 <= rho < 0.8 else word
    return (
        f"{run.name}: by norm, the matrices at step {first} rank as at step {last} with Spearman's ρ = {rho:.2f}, "
        f"{word}."
    )


def _extrapolation(run: Run, way: Trajectory) -> str:
    along, norms, steps = aligned(way), norm_share(way), way.steps
    at = int(np.argmin([abs(step - EARLY * steps[-1]) for step in steps[:-1]]))
    if not np.isfinite([along[at], norms[at]]).all():
        return f"{run.name}: there is no update to extrapolate at step {steps[at]}."
    text = f"{run.name}: at step {steps[at]} ({percent(steps[at] / steps[-1])} of the way) the update had "
    text += f"{percent(norms[at])} of its final norm, and its leading directions agreed with the final ones to |cos| "
    text += f"{along[at]:.2f} ({aligned(way, 1)[at]:.2f} for the first one). "
    ahead = along[at] - norms[at]
    if norms[at] >= 0.9:
        return text + "Most of the distance was gone: little is left to extrapolate."
    if along[at] >= THRESHOLD:
        return text + "The directions were known and the distance was not: going on along them is promising."
    if along[at] >= 0.5 and ahead > 0.1:
        return text + "The directions were known in part: short extrapolations may help, long ones would go astray."
    return text + "The directions were still to change: going far along them would lead elsewhere."


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
