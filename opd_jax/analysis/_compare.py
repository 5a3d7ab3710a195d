"""Runs side by side: measures with bootstrap intervals, at equal norm too; norms by layer; scores by norm."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd_jax.analysis._geometry import MEASURES, Geometry, MatrixGeometry

Table = list[dict[str, Any]]


def compare(
    runs: Mapping[str, Sequence[Geometry]],
    *,
    scores: Mapping[str, Mapping[int, float]] | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Table]:
    """Tables of what distinguishes runs from one base; the first is what the others are compared with.

    Differences are means over the attention and MLP matrices that both runs have changed, matrix by matrix,
    and their intervals are percentiles of means over matrices drawn with replacement. They tell how much
    depends on which matrices a model has, not what another seed of the training would give.

    Args:
        runs: by name, the geometries of a run's checkpoints, in order.
        scores: by name and step, such as accuracies.
        samples: of the bootstrap.
        confidence: of the intervals, in (0, 1).
        seed: of the bootstrap.

    Returns:
        "measures": of the last checkpoints: reference, run, measure, means, difference, low, high.
        "equal_norm": the same of the checkpoints whose ||dW|| come nearest to the smallest of the runs' last.
        "layers": ||dW|| by layer and kind, a column a run.
        "norms": ||dW|| of every checkpoint, and its score.
        "scores_at_norm": scores interpolated linearly in ||dW|| at the norms that both runs span.

    Raises:
        ValueError: if there are no runs, or a run has no checkpoint.

    Example:
        >>> import numpy as np
        >>> from opd_jax import analysis
        >>> base, a = {"up": np.zeros((2, 2), np.float32)}, {"up": np.diag([3.0, 4.0])}
        >>> found = analysis.geometry(base, [a, {"up": 2 * a["up"]}])
        >>> row = compare({"one": found[:1], "two": found[1:]})["measures"][0]
        >>> row["measure"], row["one"], row["two"], row["difference"]
        ('frobenius', 5.0, 10.0, 5.0)
    """
    if not runs or not all(len(checkpoints) for checkpoints in runs.values()):
        raise ValueError("compare needs at least one run, and at least one checkpoint of each")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    scores = scores or {}
    last = {name: checkpoints[-1] for name, checkpoints in runs.items()}
    near = _at_equal_norm(runs)
    how = dict(samples=samples, confidence=confidence, seed=seed)
    return {
        "measures": _measures(last, **how),
        "equal_norm": _measures(near, **how),
        "layers": _layers(last),
        "norms": _norms(runs, scores),
        "scores_at_norm": _scores_at_norm(runs, scores),
    }


def bootstrap(
    differences: np.ndarray, *, samples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the mean of [N] values under resampling; NaN without values."""
    if not len(differences):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(differences), (samples, len(differences)))
    low, high = np.quantile(differences[draws].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _measures(chosen: Mapping[str, Geometry], *, samples: int, confidence: float, seed: int) -> Table:
    (first, reference), *others = chosen.items()
    table = []
    for name, found in others:
        mine, theirs = (_by_name(g) for g in (reference, found))
        shared = [matrix for matrix in mine if matrix in theirs]
        for measure in MEASURES:
            pairs = [(getattr(mine[n], measure), getattr(theirs[n], measure)) for n in shared]
            a, b = np.array(pairs, np.float64).reshape(-1, 2).T
            known = np.isfinite(a) & np.isfinite(b)
            a, b = a[known], b[known]
            low, high = bootstrap(b - a, samples=samples, confidence=confidence, seed=seed)
            means = [float(x.mean()) if len(x) else float("nan") for x in (a, b, b - a)]
            row = {"reference": first, "run": name, "measure": measure, first: means[0], name: means[1]}
            row |= {"difference": means[2], "low": low, "high": high, "matrices": len(a)}
            row |= {"reference_step": reference.step, "run_step": found.step}
            table.append(row | {"reference_norm": reference.norm, "run_norm": found.norm})
    return table


def _by_name(found: Geometry) -> dict[str, MatrixGeometry]:
    return {record.name: record for record in found.select()}


def _at_equal_norm(runs: Mapping[str, Sequence[Geometry]]) -> dict[str, Geometry]:
    target = min(checkpoints[-1].norm for checkpoints in runs.values())
    return {name: min(checkpoints, key=lambda g: abs(g.norm - target)) for name, checkpoints in runs.items()}


def _layers(last: Mapping[str, Geometry]) -> Table:
    table = []
    for kind in ("attention", "mlp"):
        norms = {name: found.by_layer((kind,)) for name, found in last.items()}
        for layer in sorted(set().union(*norms.values())):
            row: dict[str, Any] = {"layer": layer, "kind": kind}
            table.append(row | {n: found.get(layer, {}).get("norm", 0.0) for n, found in norms.items()})
    return table


def _norms(runs, scores) -> Table:
    return [
        {"run": name, "step": g.step, "norm": g.norm, "score": scores.get(name, {}).get(g.step)}
        for name, checkpoints in runs.items()
        for g in checkpoints
    ]


def _scores_at_norm(runs, scores, points: int = 11) -> Table:
    curves = {}
    for name, checkpoints in runs.items():
        pairs = [(g.norm, scores[name][g.step]) for g in checkpoints if g.step in (scores.get(name) or {})]
        if len(pairs) > 1:
            curves[name] = np.array(sorted(pairs)).T
    if len(curves) < 2:
        return []
    (first, reference), *others = curves.items()
    table = []
    for name, curve in others:
        low, high = max(reference[0, 0], curve[0, 0]), min(reference[0, -1], curve[0, -1])
        for norm in np.linspace(low, high, points) if high > low else ():
            a, b = (float(np.interp(norm, *each)) for each in (reference, curve))
            row = {"reference": first, "run": name, "norm": float(norm)}
            table.append(row | {first: a, name: b, "difference": b - a})
    return table
