"""Figures of runs side by side, and of interventions."""

import math
from collections.abc import Mapping

from opd_jax.analysis._compare import Table
from opd_jax.analysis._figure import COLORS, Figure, layout, line, plain
from opd_jax.analysis._result import Result

LABELS = {
    "frobenius": "‖ΔW‖",
    "relative": "‖ΔW‖ / ‖W_base‖",
    "spectral": "spectral norm",
    "ratio": "spectral/Frobenius",
    "effective_rank": "effective rank",
    "top1_ratio": "top-1% norm ratio",
    "numerical_rank": "numerical rank",
}


def comparison(result: Result) -> list[Figure]:
    """Differences between runs with their intervals, and scores at equal norm."""
    found = []
    last, near = (result.comparison.get(name, ()) for name in ("measures", "equal_norm"))
    same = _checkpoints(last) == _checkpoints(near)
    words = " No checkpoints come nearer in norm, so there is no comparison at equal norm." * same
    for rows, name, title, where, more in (
        (last, "differences", "Last checkpoints", "of the last checkpoints", words),
        ((), "", "", "", "")
        if same
        else (near, "equal_norm", "At nearly equal norm", "of the checkpoints whose norms come nearest", ""),
    ):
        figure = _differences(rows, name, title, where, more)
        if figure is not None:
            found.append(figure)
    if rows := result.comparison.get("scores_at_norm"):
        found.append(_scores_at_norm(rows))
    return found


def _checkpoints(rows: Table) -> set[tuple]:
    """(run, step) of everything that is compared."""
    return {(r[a], r[b]) for r in rows for a, b in (("reference", "reference_step"), ("run", "run_step"))}


def _differences(rows: Table, name: str, title: str, where: str, more: str) -> Figure | None:
    traces, kept = [], []
    runs = list(dict.fromkeys(row["run"] for row in rows))
    for run, color in zip(runs, COLORS[1:] * (len(runs) // 7 + 1), strict=False):
        of = [row for row in rows if row["run"] == run and _defined(row)]
        if not of:
            continue
        scale = [100 / row[row["reference"]] for row in of]
        x = [row["difference"] * s for row, s in zip(of, scale, strict=True)]
        low, high = ([abs(row[end] - row["difference"]) * s for row, s in zip(of, scale, strict=True)]
                     for end in ("low", "high"))  # fmt: skip
        text = [f"{row['difference']:.3g} [{row['low']:.3g}, {row['high']:.3g}]" for row in of]
        trace = line(x, [LABELS[row["measure"]] for row in of], f"{run} − {of[0]['reference']}", color)
        trace |= {
            "mode": "markers",
            "text": text,
            "hovertemplate": "%{y}: %{x:.3g}%<br>%{text}<extra></extra>",
        }
        error = {"type": "data", "symmetric": False, "array": high, "arrayminus": low}
        traces.append(trace | {"error_x": error, "marker": {"color": color, "size": 9}})
        kept += of
    if not traces:
        return None
    steps = {(r["reference"], r["reference_step"]): r["reference_norm"] for r in kept}
    steps |= {(r["run"], r["run_step"]): r["run_norm"] for r in kept}
    at = ", ".join(f"{n}{'' if s is None else f' at step {s}'} (norm {v:.3g})" for (n, s), v in steps.items())
    columns = ("reference", "run", "measure", "difference", "low", "high", "matrices")
    zero = {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 1}}
    return Figure(
        name,
        "comparison",
        title,
        f"Difference of the measures {where}, in percent of the first run's mean: {at}. Bars are 95% "
        "bootstrap intervals over matrices: they tell how much depends on which matrices a model has, not "
        "what another seed of the training would give." + more,
        "mean over matrices of (run − reference) / mean of reference",
        "Differences: " + ", ".join(f"{r['run']} {r['measure']} {r['difference']:.3g}" for r in kept),
        tuple(traces),
        layout("difference, %", "", shapes=[zero], yaxis={"type": "category", "autorange": "reversed"}),
        table=[{column: row[column] for column in columns} for row in kept],
    )


def _defined(row: Mapping) -> bool:
    numbers = [row[row["reference"]], row["difference"], row["low"], row["high"]]
    return all(isinstance(n, int | float) and math.isfinite(n) for n in numbers) and numbers[0] > 0


def _scores_at_norm(rows: Table) -> Figure:
    traces, seen = [], set()
    for name in dict.fromkeys(name for row in rows for name in (row["reference"], row["run"])):
        of = [row for row in rows if name in (row["reference"], row["run"])]
        color = COLORS[len(seen) % len(COLORS)]
        seen.add(name)
        traces.append(line([r["norm"] for r in of], [r[name] for r in of], name, color))
    return Figure(
        "scores_at_norm",
        "comparison",
        "Scores at equal norm",
        "Scores of the runs at the norms that both span, interpolated between checkpoints.",
        "",
        "Scores against norm, run by run",
        tuple(trace | {"hovertemplate": "%{fullData.name}: %{y:.4g}<extra></extra>"} for trace in traces),
        layout("‖ΔW‖", "score"),
        table=rows,
    )


def interventions(result: Result) -> list[Figure]:
    """A figure for each table "intervention_*" with rows {experiment, setting, score, error}."""
    found = []
    for name, rows in result.tables().items():
        if not name.startswith("intervention_") or not rows:
            continue
        title = name.removeprefix("intervention_").replace("_", " ").capitalize()
        traces = []
        for experiment in dict.fromkeys(row["experiment"] for row in rows):
            of = [row for row in rows if row["experiment"] == experiment]
            color = COLORS[len(traces) % len(COLORS)]
            trace = line([r["setting"] for r in of], [r["score"] for r in of], str(experiment), color)
            errors = [row.get("error") for row in of]
            if any(errors):
                trace["error_y"] = {"type": "data", "array": [error or 0 for error in errors]}
            traces.append(trace | {"hovertemplate": "%{fullData.name}, %{x}: %{y:.4g}<extra></extra>"})
        words = "Score of the base with a changed update put in; bars are standard errors of the evaluation."
        best = max((r for r in rows if r["score"] is not None), key=lambda r: r["score"], default=rows[0])
        alt = f"Scores by setting; the best is {plain(best['setting'])}"
        found.append(
            Figure(
                name,
                "interventions",
                title,
                words,
                "",
                alt,
                tuple(traces),
                layout("setting", "score"),
                table=rows,
            )
        )
    return found
