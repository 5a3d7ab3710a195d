"""Figures of how the updates came about: when their directions were found, and where they went."""

from collections.abc import Iterator, Sequence

import numpy as np

from opd_jax.analysis._figure import (
    Figure,
    by_place,
    chosen,
    colored,
    heat,
    layer_axis,
    layout,
    line,
    mean,
    modules_of,
    percent,
    plain,
)
from opd_jax.analysis._result import Run
from opd_jax.analysis._trajectory import MatrixTrajectory, Trajectory

THRESHOLD = 0.8
"""|cos| that counts as locked in."""
_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


def followed(runs: Sequence[Run]) -> list[tuple[Run, Trajectory, str]]:
    """Runs with a trajectory of attention or MLP matrices that end somewhere, and their colours."""
    found = [(run, run.trajectory, color) for run, color in colored(runs) if run.trajectory is not None]
    return [(run, way, color) for run, way, color in found if np.isfinite(aligned(way)[-1:]).any()]


def aligned(way: Trajectory, directions: int | None = None) -> np.ndarray:
    """Mean |cos| of leading left directions with the final ones, over directions and matrices, [T]."""
    return np.array([mean(row) for row in way.alignment()[:, :directions]])


def norm_share(way: Trajectory) -> np.ndarray:
    """||dW_t|| / ||dW_T|| over all matrices, [T]; NaN if the last is zero."""
    return way.norms / way.norms[-1] if way.norms[-1] > 0 else np.full(len(way.steps), np.nan)


def lock_in_of(record: MatrixTrajectory, steps: Sequence[int], threshold: float = THRESHOLD) -> float:
    """`Trajectory.lock_in` for one matrix; NaN if it has no direction at the end."""
    along = np.array([mean(row) for row in record.left])
    if not np.isfinite(along[-1]):
        return float("nan")
    below = np.flatnonzero(~(along[:-1] >= threshold))
    return float(steps[below[-1] + 1 if len(below) else 0])


def lock_in(runs: Sequence[Run]) -> Figure | None:
    """Alignment with the final directions along the way, beside the norm."""
    traces, table = [], []
    for run, way, color in followed(runs):
        k = way.alignment().shape[1]
        curves = (
            (f"leading {k} directions", aligned(way), "solid"),
            ("first direction", aligned(way, 1), "dash"),
            ("norm, share of the final", norm_share(way), "dot"),
        )
        for name, y, dash in curves:
            hover = "%{fullData.name}<br>step %{x}: %{y:.3f}<extra></extra>"
            traces.append(line(way.steps, y, f"{run.name} · {name}", color, dash, hovertemplate=hover))
        table += [
            {"run": run.name, "step": step} | {name: float(y[t]) for name, y, _ in curves}
            for t, step in enumerate(way.steps)
        ]
    if not traces:
        return None
    rule = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": THRESHOLD, "y1": THRESHOLD}
    return Figure(
        "lock_in",
        "findings",
        "When the directions were found",
        "Mean |cos| between the left singular vectors of the update so far and those of the final update, "
        "index by index; and the norm so far. Directions above the dotted norm were found sooner than the "
        f"distance was gone. The line at {THRESHOLD} is where they count as locked in. The last point is 1 "
        "by definition, and every update holds the ones before it: some agreement comes from that alone.",
        "|⟨u_k(ΔW_t), u_k(ΔW_T)⟩|, mean over k and matrices",
        "Alignment with the final directions by step: "
        + "; ".join(
            f"{run.name} " + ", ".join(f"{v:.2f}" for v in aligned(w)) for run, w, _ in followed(runs)
        ),
        tuple(traces),
        layout(
            "step",
            "|cos|, share",
            yaxis={"range": [0, 1.04]},
            shapes=[rule | {"line": {"width": 1, "dash": "dash"}, "opacity": 0.6}],
        ),
        table=table,
    )


def direction_distance(runs: Sequence[Run]) -> Figure | None:
    """Alignment with the final directions against the share of the final norm."""
    traces, table = [], []
    for run, way, color in followed(runs):
        x, y = norm_share(way), aligned(way)
        text = [f"step {step}" for step in way.steps]
        hover = "%{fullData.name}, %{text}<br>norm %{x:.3f} of the final, |cos| %{y:.3f}<extra></extra>"
        traces.append(line(x, y, run.name, color, text=text, hovertemplate=hover))
        table += [
            {"run": run.name, "step": step, "norm share": float(a), "cosine": float(b)}
            for step, a, b in zip(way.steps, x, y, strict=True)
        ]
    if not traces:
        return None
    even = line([0, 1], [0, 1], "direction and distance alike", "#8b93a1", "dot", mode="lines")
    return Figure(
        "direction_distance",
        "findings",
        "Direction against distance",
        "How well the leading directions are known, against how much of the way is gone. Extrapolation has "
        "something to win above the grey line. On that line lies the whole update of a random walk, whose "
        "cosine with the end is ‖ΔW_t‖ / ‖ΔW_T‖.",
        "mean |cos(u_k)| against ‖ΔW_t‖_F / ‖ΔW_T‖_F",
        "Alignment against the share of the final norm",
        (*traces, even | {"hoverinfo": "skip"}),
        layout(
            "‖ΔW<sub>t</sub>‖ / ‖ΔW<sub>T</sub>‖",
            "mean |cos|",
            xaxis={"range": [0, 1.04]},
            yaxis={"range": [0, 1.04]},
        ),
        table=table,
    )


def alignment(runs: Sequence[Run]) -> list[Figure]:
    """Alignment of every index, and directions of the first checkpoint against those of the last."""
    if not followed(runs):
        return []
    variants, table, heats, chance = [], [], [], []
    for run, way, _ in followed(runs):
        steps = [str(step) for step in way.steps]
        for side in ("left", "right"):
            z = way.alignment(side).T
            hover = "step %{x}, k = %{y}<br>|cos| %{z:.3f}"
            trace = heat(z, steps, range(1, len(z) + 1), "|cos|", hover, zmin=0, zmax=1)
            variants.append((f"{run.name} · {side} singular vectors", [trace]))
        table += [
            {"run": run.name, "step": step, "side": side, "overlap of subspaces": float(value)}
            for side in ("left", "right")
            for step, value in zip(way.steps, way.overlap(side), strict=True)
        ]
        chance += [record.left.shape[1] / _rows(record, run) for record in way.select()]
        heats += _heats(run, way)
    words = (
        "Mean over attention and MLP matrices of |cos| between the k-th singular vector of the update so far "
    )
    words += (
        "and the k-th of the final one. Where singular values are close, vectors swap places and the cosine "
    )
    words += "is small although the subspace is the same; the table has the overlap of the whole subspaces, "
    words += f"which for random ones would be about {percent(mean(chance))} (left)."
    index = {"title": {"text": "k"}, "autorange": "reversed"}
    return [
        Figure(
            "alignment",
            "alignment",
            "Which directions settle when",
            words,
            "|⟨u_k(ΔW_t), u_k(ΔW_T)⟩|; overlap ‖U_{t}ᵀU_{T}‖_{F}² / K",
            "Heat map of alignment by step and index",
            layout=layout("step", "k", xaxis={"type": "category"}, yaxis=index),
            table=table,
            **chosen(variants, "Run and side"),
        ),
        Figure(
            "first_last",
            "alignment",
            "First checkpoint against last",
            "|cos| between the left singular vectors of the first update (down) and of the last (across). "
            "A bright diagonal: the same directions, in the same order, from the start.",
            "|U_{1}ᵀ U_{T}|",
            "Heat map of first against last directions",
            layout=layout("k of the last checkpoint", "k of the first", yaxis={"autorange": "reversed"}),
            **chosen(heats, "Matrix"),
        ),
    ]


def _rows(record: MatrixTrajectory, run: Run) -> int:
    found = (r.shape[0] for g in run.checkpoints for r in g.records if r.name == record.name)
    return next(found, record.left.shape[1])


def _heats(run: Run, way: Trajectory) -> Iterator[tuple[str, list]]:
    records = way.select()
    size = max(len(record.heat) for record in records)
    padded = [np.pad(r.heat, ((0, size - len(r.heat)),) * 2, constant_values=np.nan) for r in records]
    stack = np.stack(padded)
    known = np.isfinite(stack).sum(0)
    average = np.where(known, np.nansum(stack, 0) / np.maximum(known, 1), np.nan)
    labels = [f"mean of {len(records)} matrices", *(record.name for record in records)]
    for label, z in zip(labels, [average, *(record.heat for record in records)], strict=True):
        index = range(1, len(z) + 1)
        hover = "first k = %{y}, last k = %{x}<br>|cos| %{z:.3f}"
        yield f"{run.name} · {label}", [heat(np.round(z, 3), index, index, "|cos|", hover, zmin=0, zmax=1)]


def representatives(way: Trajectory) -> list[MatrixTrajectory]:
    """A matrix of each module, from the middle of the model."""
    found = []
    for module in modules_of(way.select()):
        records = sorted(
            (r for r in way.select() if r.module == module), key=lambda r: (r.layer is None, r.layer or 0)
        )
        found.append(records[len(records) // 2])
    return found


def paths(runs: Sequence[Run]) -> list[Figure]:
    """The way of u_1 by PCA and by t-SNE, and how much of it two components hold."""
    variants, embedded, traces, table = [], [], [], []
    for run, way, color in followed(runs):
        first = representatives(way)
        rest = [record for record in way.select() if record not in first]
        flats = {record.name: record.path() for record in (*first, *rest)}
        for record in (*first, *rest):
            points, ratio = flats[record.name]
            label = f"{run.name} · {record.name}" + (f" · EVR {ratio:.2f}" if np.isfinite(ratio) else "")
            variants.append((label, _way(points, way.steps, color)))
        embedded += _embedded(run, way, first, color)
        known = [record for record in way.select() if np.isfinite(flats[record.name][1])]
        traces.append(
            {"type": "box", "x": [r.module for r in known], "y": [flats[r.name][1] for r in known]}
            | {"name": plain(run.name), "text": [plain(r.name) for r in known], "boxpoints": "all"}
            | {"jitter": 0.5, "pointpos": 0, "marker": {"color": color, "size": 5}, "line": {"width": 1}}
            | {"fillcolor": "rgba(0,0,0,0)", "hoveron": "points"}
            | {"hovertemplate": "%{text}<br>EVR %{y:.3f}<extra></extra>"}
        )
        table += [
            {
                "run": run.name,
                "module": m,
                "mean EVR": mean([flats[r.name][1] for r in known if r.module == m]),
            }
            for m in modules_of(known)
        ]
    if not variants:
        return []
    return [_pca(variants), *([_tsne(embedded)] if embedded else []), _evr(traces, table)]


def _way(points: np.ndarray, steps: Sequence[int], color: str) -> list[dict]:
    """A path, its points coloured from the first step to the last."""
    text = [f"step {step}" for step in steps]
    known = np.flatnonzero(np.isfinite(points[:, 0]))
    ends = [text[t] if t in (known[:1].tolist() + known[-1:].tolist()) else "" for t in range(len(text))]
    marker = {"color": list(range(len(steps))), "colorscale": "Viridis", "size": 9}
    hover = "%{customdata}<extra></extra>"
    trace = line(np.round(points[:, 0], 5), np.round(points[:, 1], 5), "u_1", color, customdata=text)
    trace |= {"mode": "lines+markers+text", "text": ends, "textposition": "top center", "cliponaxis": False}
    trace |= {"line": {"color": "#8b93a1", "width": 1}, "hovertemplate": hover, "showlegend": False}
    return [trace | {"marker": marker | {"line": {"width": 1, "color": "#8b93a1"}}}]


def _pca(variants) -> Figure:
    return Figure(
        "u1_path",
        "paths",
        "The way of the first direction",
        "The leading left singular vector of the update at every checkpoint, as points in the plane of their "
        "two principal components; dark is early, bright is late.",
        "PCA of u_1(ΔW_1), …, u_1(ΔW_T), signs as at the end",
        "Path of the first direction in two dimensions",
        layout=layout("first component", "second component", yaxis={"scaleanchor": "x"}),
        **chosen(variants, "Matrix"),
    )


def _evr(traces, table) -> Figure:
    return Figure(
        "evr",
        "paths",
        "How flat that way is",
        "Share of the way's variance in its first two components. A high share alone means little: a "
        "random walk in many dimensions has about 0.76 (arXiv 1806.08805), three checkpoints always have 1.",
        "EVR = (λ₁ + λ₂) / Σ λᵢ",
        "Explained variance ratio by module; means: "
        + ", ".join(f"{r['run']} {r['module']} {r['mean EVR']:.2f}" for r in table),
        tuple(traces),
        layout("module", "EVR", xaxis={"type": "category"}, yaxis={"range": [0, 1.05]}, boxmode="group"),
        table=table,
    )


def _tsne(variants) -> Figure:
    return Figure(
        "u1_tsne",
        "paths",
        "The same way by t-SNE",
        "As the paper draws it, for a matrix of each module from the middle of the model. t-SNE keeps "
        "neighbours together; distances between far points and the shape as a whole mean nothing.",
        "",
        "Path of the first direction by t-SNE",
        layout=layout("", "", xaxis={"showticklabels": False}, yaxis={"showticklabels": False}),
        **chosen(variants, "Matrix"),
    )


def _embedded(run: Run, way: Trajectory, records: Sequence[MatrixTrajectory], color: str) -> list:
    try:
        return [(f"{run.name} · {record.name}", _way(record.tsne(), way.steps, color)) for record in records]
    except (ImportError, ValueError):
        return []  # no scikit-learn, or fewer than four directions: PCA shows the same


def settled(runs: Sequence[Run]) -> list[Figure]:
    """The lock-in step, by threshold and by matrix."""
    traces, table, variants = [], [], []
    for run, way, color in followed(runs):
        steps = [way.lock_in(threshold) for threshold in _THRESHOLDS]
        hover = "%{fullData.name}<br>|cos| ≥ %{x}: from step %{y} on<extra></extra>"
        traces.append(line(_THRESHOLDS, steps, run.name, color, hovertemplate=hover, line_shape="hv"))
        table += [
            {"run": run.name, "threshold": threshold, "lock-in step": step}
            for threshold, step in zip(_THRESHOLDS, steps, strict=True)
        ]
        values, names, layers, modules = by_place(way.select(), lambda r, w=way: lock_in_of(r, w.steps))
        if layers:
            hover = "%{customdata}<br>from step %{z} on"
            trace = heat(values, layers, modules, "step", hover, customdata=names, zmin=way.steps[0])
            variants.append((run.name, [trace | {"zmax": way.steps[-1], "reversescale": True}]))
    if not traces:
        return []
    for trace in traces:
        trace["line"] = trace["line"] | {"shape": trace.pop("line_shape")}
    found = [
        Figure(
            "lock_in_threshold",
            "settled",
            "Lock-in step by threshold",
            "The first checkpoint from which on the mean |cos| of the leading directions with the final "
            "ones stays at or above a threshold. It can be no finer than the steps of the checkpoints, and "
            "no later than the last.",
            "min {t : mean |cos| at every t' ≥ t is ≥ threshold}",
            "Lock-in step against the threshold",
            tuple(traces),
            layout("threshold for |cos|", "step", yaxis={"rangemode": "tozero"}),
            table=table,
        )
    ]
    if variants:
        words = (
            f"The step from which on the directions of a matrix stay at |cos| ≥ {THRESHOLD}; bright is early."
        )
        found.append(
            Figure(
                "lock_in_places",
                "settled",
                "Lock-in step of every matrix",
                words,
                "",
                "Lock-in step by layer and module",
                layout=layout(
                    "layer",
                    "",
                    xaxis=layer_axis([r.layer for _, way, _ in followed(runs) for r in way.select()]),
                    yaxis={"autorange": "reversed", "type": "category"},
                ),
                **chosen(variants, "Run"),
            )
        )
    return found
