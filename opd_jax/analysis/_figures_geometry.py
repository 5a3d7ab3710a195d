"""Figures of what the updates look like: their size, where it sits, and how few directions hold it."""

import math
from collections.abc import Sequence

import numpy as np

from opd_jax.analysis._figure import (
    COLORS,
    Figure,
    by_place,
    chosen,
    colored,
    heat,
    last_changed,
    layer_axis,
    layout,
    line,
    mean,
    modules_of,
    percent,
    plain,
    share,
    steps_of,
)
from opd_jax.analysis._geometry import FRACTIONS, MatrixGeometry
from opd_jax.analysis._result import KEPT, Run

_KINDS = (("attention", "dash"), ("mlp", "solid"))
_MEASURES = (
    ("spectral", "Spectral norm", "Spectral norm s₁", "The largest singular value of the update.", "s₁"),
    (
        "ratio",
        "Spectral/Frobenius ratio",
        "s₁ / ‖ΔW‖",
        "How much of the update's norm one direction holds: 1 for a matrix of rank one.",
        "s₁ / ‖ΔW‖_F",
    ),
    (
        "effective_rank",
        "Effective rank",
        "Effective rank",
        "The number of equally strong directions with the same entropy of singular values.",
        "exp(−Σ pᵢ log pᵢ), pᵢ = sᵢ / Σ sⱼ",
    ),
    (
        "top1_ratio",
        "Top-1% norm ratio",
        "Top-1% norm ratio",
        "The share of the norm in the leading 1% of the directions, at least one of them.",
        "√(Σ_{i≤k} sᵢ² / Σ sⱼ²), k = ⌈r/100⌉, r the numerical rank",
    ),
)


def gaussian_ratio(records: Sequence[MatrixGeometry]) -> float:
    """The mean s_1 / ||dW||_F that updates without structure would have.

    A Gaussian [m, n] matrix has s_1 near sigma (sqrt m + sqrt n) and norm near sigma sqrt(m n).
    """
    return mean([1 / math.sqrt(r.shape[0]) + 1 / math.sqrt(r.shape[1]) for r in records])


def concentration(runs: Sequence[Run]) -> Figure | None:
    """Mean captured energy against the share of the directions."""
    traces, table = [], []
    x = [100 * fraction for fraction in FRACTIONS]
    for run, color in colored(runs):
        if (g := last_changed(run)) is None:
            continue
        energy = 100 * np.mean([record.energy for record in g.select()], 0)
        hover = "%{fullData.name}: %{y:.3g}% in the leading %{x:g}%<extra></extra>"
        traces.append(line(x, energy, run.name, color, hovertemplate=hover))
        table += [
            {"run": run.name, "directions %": f, "energy %": float(e)} for f, e in zip(x, energy, strict=True)
        ]
    if not traces:
        return None
    flat = line(x, x, "all directions equal", "#8b93a1", "dot", mode="lines", hoverinfo="skip")
    ten = [row["energy %"] for row in table if row["directions %"] == 10]
    return Figure(
        "concentration",
        "findings",
        "How few directions hold the update",
        "Share of ‖ΔW‖² in the leading directions of a matrix, against their share of its numerical rank; "
        "mean over attention and MLP matrices, last checkpoint. The higher on the left, the more "
        "concentrated; shares of less than one direction count as one.",
        "Σ_{i≤k} sᵢ² / Σ sⱼ², k = ⌈f·r⌉",
        "Captured energy: the leading tenth of the directions holds "
        + ", ".join(f"{value:.0f}%" for value in ten),
        (*traces, flat),
        layout(
            "leading directions, % of the rank",
            "share of ‖ΔW‖², %",
            xaxis={"type": "log", "tickvals": [0.1, 1, 10, 100]},
            yaxis={"range": [0, 103]},
        ),
        table=table,
    )


def depth(runs: Sequence[Run]) -> Figure | None:
    """Norms by layer, attention and MLP apart."""
    traces, table = [], []
    for run, color in colored(runs):
        for kind, dash in _KINDS:
            found = run.checkpoints[-1].by_layer((kind,))
            if found:
                name = f"{run.name} · {kind.replace('mlp', 'MLP')}"
                norms = [row["norm"] for row in found.values()]
                hover = "%{fullData.name}<br>layer %{x}: %{y:.4g}<extra></extra>"
                traces.append(line(found, norms, name, color, dash, hovertemplate=hover))
                table += [
                    {"run": run.name, "kind": kind, "layer": layer, "norm": norm}
                    for layer, norm in zip(found, norms, strict=True)
                ]
    if not traces:
        return None
    top = max(table, key=lambda row: row["norm"])
    return Figure(
        "layers",
        "findings",
        "Where the update sits",
        "Norm of the update of each layer, attention (dashed) and MLP (solid) apart, last checkpoint.",
        "‖ΔW‖_F = √(Σ over the layer's matrices of that kind)",
        f"Update norm by layer; the largest is {top['kind']} of layer {top['layer']} in {top['run']}",
        tuple(traces),
        layout(
            "layer", "‖ΔW‖", xaxis=layer_axis([row["layer"] for row in table]), yaxis={"rangemode": "tozero"}
        ),
        table=table,
    )


def modules(runs: Sequence[Run]) -> Figure | None:
    """Each module's share of the squared norm, beside its share of the parameters."""
    traces, table = [], []
    for run, color in colored(runs):
        if (g := last_changed(run)) is None:
            continue
        records = [r for r in g.records if r.kind in ("attention", "mlp")]
        names = modules_of(records)
        shares = {m: share([r for r in records if r.module == m], records) for m in names}
        if not traces:
            sizes = [100 * shares[m][1] for m in names]
            traces.append(
                {"type": "bar", "x": names, "y": sizes, "name": "share of the parameters"}
                | {"marker": {"color": "#8b93a1"}, "hovertemplate": "%{x}: %{y:.3g}% of the parameters"}
            )
        bar = {"type": "bar", "x": names, "y": [100 * shares[m][0] for m in names], "name": plain(run.name)}
        hover = "%{fullData.name}, %{x}: %{y:.3g}% of ‖ΔW‖²<extra></extra>"
        traces.append(bar | {"marker": {"color": color}, "hovertemplate": hover})
        table += [
            {"run": run.name, "module": m, "share of squared norm": a, "share of parameters": b}
            for m, (a, b) in shares.items()
        ]
    if not traces:
        return None
    return Figure(
        "modules",
        "findings",
        "Who moves more than its share",
        "Share of ‖ΔW‖² that each kind of matrix holds, beside its share of the parameters. A coloured bar "
        "below the grey one has moved less, for its size, than average; attention and MLP, last checkpoint.",
        "Σ_module ‖ΔW‖² / Σ_all ‖ΔW‖²",
        "Shares of the squared norm: "
        + ", ".join(f"{r['run']} {r['module']} {percent(r['share of squared norm'])}" for r in table),
        tuple(traces),
        layout("module", "share, %", barmode="group", xaxis={"type": "category"}),
        table=table,
    )


def measures(runs: Sequence[Run]) -> list[Figure]:
    """The measures of Table 1, matrix by matrix."""
    found = []
    for measure, title, axis, words, formula in _MEASURES:
        traces, table = [], []
        for run, color in colored(runs):
            if (g := last_changed(run)) is None:
                continue
            records = sorted(g.select(), key=lambda r: modules_of(g.select()).index(r.module))
            values = [float(getattr(r, measure)) for r in records]
            traces.append(
                {"type": "box", "x": [r.module for r in records], "y": values, "name": plain(run.name)}
                | {"text": [plain(r.name) for r in records], "boxpoints": "all", "jitter": 0.5, "pointpos": 0}
                | {"marker": {"color": color, "size": 5, "opacity": 0.75}, "line": {"width": 1}}
                | {"fillcolor": "rgba(0,0,0,0)", "hoveron": "points"}
                | {"hovertemplate": "%{text}<br>%{fullData.name}: %{y:.4g}<extra></extra>"}
            )
            for module in modules_of(records):
                of = [v for r, v in zip(records, values, strict=True) if r.module == module]
                table.append({"run": run.name, "module": module, "mean": mean(of), "matrices": len(of)})
        if measure == "ratio" and traces:
            null = gaussian_ratio(next(g for g in map(last_changed, runs) if g).select())
            words += f" Gaussian noise of these shapes would have about {percent(null)}."
        if traces:
            alt = f"{title} of every matrix by module; means: " + ", ".join(
                f"{row['run']} {row['module']} {row['mean']:.3g}" for row in table
            )
            frame = layout("module", axis, boxmode="group", xaxis={"type": "category"})
            words += " A point is a matrix; last checkpoint."
            found.append(
                Figure(measure, "table1", title, words, formula, alt, tuple(traces), frame, table=table)
            )
    return found


def norms(runs: Sequence[Run]) -> list[Figure]:
    """Norms along the way, and scores against them."""
    found, traces, table = [], [], []
    for run, color in colored(runs):
        if len(run.checkpoints) < 2:
            continue
        steps = steps_of(run)
        for kind, dash in (("all", "solid"), ("mlp", "dash"), ("attention", "dot"), ("embedding", "dashdot")):
            values = [
                math.sqrt(sum(r.frobenius**2 for r in g.records if kind in ("all", r.kind)))
                for g in run.checkpoints
            ]
            if any(values):
                name = f"{run.name} · {kind.replace('mlp', 'MLP')}"
                hover = "%{fullData.name}<br>step %{x}: %{y:.4g}<extra></extra>"
                traces.append(line(steps, values, name, color, dash, hovertemplate=hover))
                table += [
                    {"run": run.name, "matrices": kind, "step": step, "norm": value}
                    for step, value in zip(steps, values, strict=True)
                ]
    if traces:
        words = "Distance from the base at every checkpoint: all matrices, and their parts."
        alt = f"Norm of the update over steps, up to {max(row['norm'] for row in table):.3g}"
        frame = layout("step", "‖ΔW‖", yaxis={"rangemode": "tozero"})
        title = "How far the weights have gone"
        formula = "‖W_t − W_base‖_F"
        found.append(Figure("norms", "norms", title, words, formula, alt, tuple(traces), frame, table=table))
    if (figure := _scores(runs)) is not None:
        found.append(figure)
    return found


def _scores(runs: Sequence[Run]) -> Figure | None:
    traces, table = [], []
    for run, color in colored(runs):
        points = [(g.norm, run.scores[g.step], g.step) for g in run.checkpoints if g.step in run.scores]
        if points:
            x, y, steps = zip(*points, strict=True)
            text = ["" if step is None else f"step {step}" for step in steps]
            hover = "%{fullData.name}, %{text}<br>norm %{x:.4g}, score %{y:.4g}<extra></extra>"
            traces.append(line(x, y, run.name, color, text=text, hovertemplate=hover))
            table += [{"run": run.name, "step": s, "norm": n, "score": v} for n, v, s in points]
    if not traces:
        return None
    return Figure(
        "score_norm",
        "norms",
        "What a distance buys",
        "Score of every checkpoint against its distance from the base. Higher at the same norm is a shorter "
        "way to the same quality; scores carry the noise of their evaluation.",
        "score(W_t) against ‖W_t − W_base‖_F",
        f"Score against norm; the best score is {max(row['score'] for row in table):.3g}",
        tuple(traces),
        layout("‖ΔW‖", "score"),
        table=table,
    )


def places(runs: Sequence[Run]) -> Figure | None:
    """How far each matrix moved for its size: layers across, modules down."""
    variants, table = [], []
    for run in runs:
        if (g := last_changed(run)) is None:
            continue
        values, names, layers, names_down = by_place(g.select(), lambda r: 100 * r.relative)
        if layers:
            hover = "%{customdata}<br>%{z:.3g}% of the base's norm"
            variants.append((run.name, [heat(values, layers, names_down, "%", hover, customdata=names)]))
            for i, module in enumerate(names_down):
                table += [
                    {"run": run.name, "module": module, "layer": layer, "relative norm %": value}
                    for layer, value in zip(layers, values[i], strict=True)
                ]
    if not variants:
        return None
    top = max(table, key=lambda row: row["relative norm %"] if row["relative norm %"] > 0 else 0)
    return Figure(
        "places",
        "layers",
        "How far every matrix moved",
        "Norm of the update of each matrix, in percent of the norm of the base's matrix; last checkpoint.",
        "‖ΔW‖_F / ‖W_base‖_F",
        f"Relative norm by layer and module; largest: {top['module']} of layer {top['layer']}, {top['run']}",
        layout=layout(
            "layer",
            "",
            xaxis=layer_axis([row["layer"] for row in table]),
            yaxis={"autorange": "reversed", "type": "category"},
        ),
        table=table,
        **chosen(variants, "Run"),
    )


def spectra(runs: Sequence[Run]) -> list[Figure]:
    """Energy by module, and the leading singular values of every matrix."""
    energy, values, table, slopes = [], [], [], []
    x = [100 * fraction for fraction in FRACTIONS]
    for run in runs:
        if (g := last_changed(run)) is None:
            continue
        curves, lines = [], []
        for module, color in zip(modules_of(g.select()), COLORS * 2, strict=False):
            records = [r for r in g.select() if r.module == module]
            y = 100 * np.mean([r.energy for r in records], 0)
            hover = "%{fullData.name}: %{y:.3g}% in the leading %{x:g}%<extra></extra>"
            curves.append(line(x, y, module, color, hovertemplate=hover))
            table += [
                {"run": run.name, "module": module, "directions %": f, "energy %": float(e)}
                for f, e in zip(x, y, strict=True)
            ]
            lines.append(_joined(records, module, color))
            slopes += [
                {"run": run.name, "module": module, "index": i}
                | {"s_i / s_1": mean([_relative(r)[i - 1] for r in records if len(_relative(r)) >= i])}
                for i in (2, 4, 8, 16, 32)
            ]
        energy.append((run.name, curves))
        values.append((run.name, lines))
    if not energy:
        return []
    log = {"type": "log"}
    return [
        Figure(
            "energy_modules",
            "spectra",
            "Captured energy by module",
            "The curve of captured energy for each kind of matrix: mean over layers, last checkpoint.",
            "Σ_{i≤k} sᵢ² / Σ sⱼ², k = ⌈f·r⌉",
            "Captured energy by module against the share of the directions",
            layout=layout(
                "leading directions, % of the rank",
                "share of ‖ΔW‖², %",
                xaxis=log | {"tickvals": [0.1, 1, 10, 100]},
                yaxis={"range": [0, 103]},
            ),
            table=table,
            **chosen(energy, "Run"),
        ),
        Figure(
            "spectra",
            "spectra",
            "Singular values of every matrix",
            f"The {KEPT} largest singular values of each update, relative to its largest; a line is a "
            "matrix. Steep lines are updates of few directions.",
            "sᵢ / s₁",
            "Relative singular values of every matrix, falling with their index",
            layout=layout("index i", "sᵢ / s₁", xaxis=log | {"dtick": "D2"}, yaxis=log | {"dtick": "D2"}),
            table=slopes,
            **chosen(values, "Run"),
        ),
    ]


def _relative(record: MatrixGeometry) -> np.ndarray:
    values = np.asarray(record.singular_values[:KEPT], np.float64)
    values = values[: record.numerical_rank]
    return values / values[0]


def _joined(records: Sequence[MatrixGeometry], module: str, color: str) -> dict:
    """All matrices of a module as one trace, with gaps between them: few traces draw fast."""
    x, y, text = [], [], []
    for record in records:
        values = _relative(record)
        x += [*range(1, len(values) + 1), None]
        y += [*map(float, values), None]
        text += [plain(record.name)] * len(values) + [""]
    hover = "%{text}<br>s<sub>%{x}</sub> / s<sub>1</sub> = %{y:.3g}<extra></extra>"
    trace = line(x, y, module, color, mode="lines", text=text, hovertemplate=hover)
    return trace | {"line": {"color": color, "width": 1}, "connectgaps": False, "opacity": 0.8}
