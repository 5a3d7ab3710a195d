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


class Answer(NamedTuple):
    """What there is to say of one run.

    Attributes:
        run: its name; "" for what is no run's.
        lead: the answer in a sentence.
        rest: the numbers behind it.
    """

    run: str
    lead: str
    rest: str = ""


class Finding(NamedTuple):
    """One thing that matters.

    Attributes:
        question: what a reader asks.
        answers: in the order of the runs.
        caveat: what the answers do not say.
        figure: name of the figure that shows it; it may be missing.
    """

    question: str
    answers: tuple[Answer, ...]
    caveat: str
    figure: str


def findings(result: Result) -> tuple[Finding, ...]:
    """The five findings that open the report, all of them computed from the result's numbers."""
    ways = [(run, way) for run, way, _ in followed(result.runs)]
    changed = [(run, g) for run in result.runs if (g := last_changed(run)) is not None]
    equal = [
        Answer(run.name, "No attention or MLP matrix differs from the base's.")
        for run in result.runs
        if last_changed(run) is None
    ]
    alone = (Answer("", ONE_CHECKPOINT),)
    if any(run.trajectory is not None for run in result.runs):
        alone = (Answer("", "No run has an update at its end, so there are no directions to follow."),)
    return (
        Finding(
            "How concentrated is the update?",
            (*(_concentrated(run, g) for run, g in changed), *_more_concentrated(result), *equal),
            "Gaussian noise is what an update without any structure would be. Ratios depend on the shape "
            "of a matrix: compare them between runs of one base only.",
            "concentration",
        ),
        Finding(
            "When were the directions locked in?",
            tuple(_locked(run, way) for run, way in ways) or alone,
            "A step is known no finer than the checkpoints. The reference is the last checkpoint given, "
            "which need not be where training would end.",
            "lock_in",
        ),
        Finding(
            "Which layers moved?",
            (*(_moved(run, g) for run, g in changed), *equal),
            "Norms say how far weights went, not how much that matters.",
            "layers",
        ),
        Finding(
            "What does it mean for freezing?",
            (*(_freezing(run, g) for run, g in changed), *(_ranks(run) for run, _ in ways), *equal),
            "A small update can still be needed: this ranks candidates, and only a run with them frozen "
            "shows what they cost.",
            "modules",
        ),
        Finding(
            "What does it mean for extrapolation?",
            tuple(_extrapolation(run, way) for run, way in ways) or alone,
            "Judged by directions and norms alone; the score of extrapolated weights is not measured here.",
            "direction_distance",
        ),
    )


def _concentrated(run: Run, g: Geometry) -> Answer:
    records, means = g.select(), g.mean()
    tenth = mean([r.energy[FRACTIONS.index(0.1)] for r in records])
    lead = (
        f"The strongest direction of a matrix holds {percent(means['ratio'])} of its update's norm, against "
    )
    lead += f"{percent(gaussian_ratio(records))} for noise of the same shapes."
    rest = (
        f"The leading tenth of the directions holds {percent(tenth)} of the squared norm; the effective rank "
    )
    rest += f"is {means['effective_rank']:.0f} of {means['numerical_rank']:.0f}. These are means over "
    rest += f"{len(records)} matrices."
    if all(r.numerical_rank <= 100 for r in records):
        return Answer(
            run.name, lead, rest + " The top-1% ratio is of one direction here: matrices are small."
        )
    return Answer(run.name, lead, rest + f" The leading 1% hold {percent(means['top1_ratio'])} of the norm.")


def _more_concentrated(result: Result) -> list[Answer]:
    """A sentence for each run that is compared with the first, by s_1 / ||dW||."""
    said = []
    for row in result.comparison.get("measures", ()):
        low, high = (np.nan if row[end] is None else row[end] for end in ("low", "high"))
        if row["measure"] != "ratio" or not np.isfinite([low, high]).all():
            continue
        lead = f"Between {row['run']} and {row['reference']} there is no clear difference."
        if low > 0 or high < 0:
            more, less = (row["run"], row["reference"])[:: 1 if low > 0 else -1]
            lead = f"{more} is more concentrated than {less}."
        rest = f"Difference of s₁/‖ΔW‖, {row['run']} − {row['reference']}: {100 * row['difference']:+.1f} "
        rest += f"points, 95% interval {100 * low:+.1f} to {100 * high:+.1f} over {row['matrices']} matrices."
        norms = row["run_norm"], row["reference_norm"]
        if max(norms) > 1.1 * min(norms):
            rest += f" Their norms differ, {norms[0]:.3g} and {norms[1]:.3g}, and ratios change along a run."
        said.append(Answer("", lead, rest))
    return said


def _locked(run: Run, way: Trajectory) -> Answer:
    along, norms, steps = aligned(way), norm_share(way), way.steps
    k = way.alignment().shape[1]
    step, first = way.lock_in(THRESHOLD), way.lock_in(THRESHOLD, directions=1)
    at = steps.index(step)
    if at == len(steps) - 1:
        lead = "Not before the last checkpoint."
        rest = f"At step {steps[-2]} of {steps[-1]}, with {percent(norms[-2])} of the final norm, the {k} "
        rest += (
            f"leading directions agreed with the final ones to |cos| {along[-2]:.2f} on average, below "
            f"{THRESHOLD}."
        )
    else:
        lead = f"From step {step} of {steps[-1]} on, {percent(step / steps[-1])} of the way."
        rest = f"Since then the {k} leading directions agree with the final ones to |cos| {THRESHOLD} or "
        rest += f"better, on average; the norm was at {percent(norms[at])} of the final."
        if at == 0:
            rest += " That is the first checkpoint: it may have been sooner."
    return Answer(run.name, lead, rest + f" The strongest direction alone is there from step {first} on.")


def _moved(run: Run, g: Geometry) -> Answer:
    records = g.select()
    whole = [r for r in g.records if r.kind in ("attention", "mlp")]
    part, size = share([r for r in records if r.kind == "mlp"], whole)
    word = "more than" if part > size + 0.02 else "less than" if part < size - 0.02 else "about"
    lead = f"MLP matrices moved {word} their share: {percent(part)} of the squared norm, with "
    lead += f"{percent(size)} of the parameters."
    rest = []
    layers = sorted({r.layer for r in records if r.layer is not None})
    if len(layers) >= 2:
        parts = np.array_split(layers, 3 if len(layers) >= 6 else 2)
        shares = [share([r for r in records if r.layer in set(each)], records)[0] for each in parts]
        named = [f"{percent(s)} in layer{_range(each)}" for s, each in zip(shares, parts, strict=True)]
        rest.append(f"By depth: {', '.join(named)}.")
    known = [r for r in records if np.isfinite(r.relative)]
    if known:
        top = max(known, key=lambda r: r.relative)
        rest.append(f"Furthest for its size: {top.name}, by {percent(top.relative)} of the base's norm.")
    embedded = [r for r in g.records if r.kind == "embedding" and np.isfinite(r.relative)]
    if embedded:
        moved = percent(mean([r.relative for r in embedded]))
        rest.append(f"Embeddings and head moved by {moved} of theirs.")
    return Answer(run.name, lead, " ".join(rest))


def _range(layers: Sequence[int]) -> str:
    return f" {layers[0]}" if len(layers) == 1 else f"s {layers[0]} to {layers[-1]}"


def _freezing(run: Run, g: Geometry) -> Answer:
    """The kinds of matrices that moved least for their size, and what freezing them would leave out."""
    whole = [r for r in g.records if r.kind in ("attention", "mlp")]
    groups = {m: [r for r in whole if r.module == m] for m in modules_of(whole)}
    density = {m: np.divide(*share(records, whole)) for m, records in groups.items()}
    low = [m for m in sorted(groups, key=density.get) if density[m] < 0.5]
    if low:
        part, size = share([r for m in low for r in groups[m]], whole)
        lead = f"First candidates: {_listed(low)}, with {percent(part)} of the squared norm and "
        lead += f"{percent(size)} of the parameters."
    else:
        least = min(groups, key=density.get)
        lead = "No kind of matrix stands out."
        lead += f" The least moved for its size, {least}, still has {density[least]:.2f} times its share."
    half = _until_half(sorted(whole, key=lambda r: r.frobenius**2 / (r.shape[0] * r.shape[1])), whole)
    part, size = share(half, whole)
    rest = f"The {len(half)} of {len(whole)} matrices that moved least per parameter ({percent(size)} of the "
    return Answer(run.name, lead, rest + f"parameters) hold {percent(part)} of the squared norm.")


def _until_half(ordered: Sequence[MatrixGeometry], whole: Sequence[MatrixGeometry]) -> list[MatrixGeometry]:
    """The first of them that make up half of the parameters, or as near as they come without exceeding it."""
    limit, kept, used = sum(r.shape[0] * r.shape[1] for r in whole) / 2, [], 0
    for record in ordered:
        used += record.shape[0] * record.shape[1]
        if used > limit:
            break
        kept.append(record)
    return kept


def _ranks(run: Run) -> Answer:
    """Whether the first checkpoint ranks matrices as the last one does."""
    records = [r for r in run.trajectory.select() if r.norms[0] > 0]
    first, last = run.trajectory.steps[0], run.trajectory.steps[-1]
    if len(records) < 3:
        return Answer(run.name, f"Too few matrices had moved at step {first} to compare rankings.")
    early, late = (np.argsort(np.argsort([r.norms[t] for r in records])) for t in (0, -1))
    rho = float(np.corrcoef(early, late)[0, 1])
    lead = "An early ranking of the matrices would mislead."
    if rho >= 0.5:
        lead = f"An early ranking of the matrices {'holds' if rho >= 0.8 else 'is a rough guide'}."
    rest = f"Ranked by norm at step {first} and at step {last}, Spearman's ρ is {rho:.2f}."
    return Answer(run.name, lead, rest)


def _extrapolation(run: Run, way: Trajectory) -> Answer:
    along, norms, steps = aligned(way), norm_share(way), way.steps
    at = int(np.argmin([abs(step - EARLY * steps[-1]) for step in steps[:-1]]))
    first = aligned(way, 1)[at]
    if not np.isfinite([along[at], norms[at]]).all():
        return Answer(run.name, f"There is no update to extrapolate at step {steps[at]}.")
    rest = f"At step {steps[at]} ({percent(steps[at] / steps[-1])} of the way) the update had "
    rest += (
        f"{percent(norms[at])} of its final norm; its {way.alignment().shape[1]} leading directions agreed "
    )
    rest += f"with the final ones to |cos| {along[at]:.2f} on average, the strongest to {first:.2f}."
    lead = "Early directions were still to change: going far along all of them would lead elsewhere."
    if norms[at] >= 0.9:
        lead = "Most of the distance was gone early: little is left to extrapolate."
    elif along[at] >= THRESHOLD:
        lead = "Promising: early on the directions were known and the distance was not."
    elif first >= THRESHOLD:
        lead = "Along the strongest direction only: it was known early, the others were still to change."
    elif along[at] >= 0.5 and along[at] > norms[at] + 0.1:
        lead = "Carefully: the directions were known in part, so long extrapolations would go astray."
    return Answer(run.name, lead, rest)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
