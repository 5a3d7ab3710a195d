"""One figure of the report: what is drawn, what it means, and the same in numbers."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_jax.analysis._compare import Table
from opd_jax.analysis._geometry import Geometry, MatrixGeometry
from opd_jax.analysis._names import MODULES
from opd_jax.analysis._result import Run

Trace = dict[str, Any]
COLORS = ("#3b7dd8", "#d9691e", "#2a9670", "#a85bc4", "#97790b", "#cf4860", "#4a8a9e", "#8a6d5b")
"""Of runs, or of modules: at least 3:1 against white and against the dark background."""
SCALE = "Viridis"
_AXIS = {"automargin": True, "zeroline": False, "ticks": "outside", "ticklen": 4}


@dataclass(frozen=True)
class Figure:
    """A figure; `data` and `layout` are plotly's, as plain dicts.

    Attributes:
        name: of its files, unique in a report.
        section: of the report; see `opd_jax.analysis._figures.SECTIONS`.
        title: what it is, in plain text.
        definition: what is drawn, in words.
        formula: the same as a formula; "" if words are enough.
        alt: what there is to see, for whoever does not see it.
        data: traces.
        layout: without colours and fonts, which are the page's.
        variants: (label, traces) to choose from, the first of them being `data`; empty without a choice.
        choice: what is chosen, such as "Matrix".
        table: the numbers that are drawn, or their means.
    """

    name: str
    section: str
    title: str
    definition: str
    formula: str
    alt: str
    data: tuple[Trace, ...]
    layout: dict[str, Any]
    variants: tuple[tuple[str, tuple[Trace, ...]], ...] = ()
    choice: str = ""
    table: Table = ()

    def plotly(self, theme: str = "light"):
        """As a `plotly.graph_objects.Figure` in a theme, "light" or "dark"; of variants the first.

        Raises:
            ImportError: without plotly.
        """
        from opd_jax._extras import require

        objects = require("plotly.graph_objects", "analysis")
        return objects.Figure(self.data, self.layout | {"template": template(theme, standalone=True)})


def template(theme: str, *, standalone: bool = False) -> dict[str, Any]:
    """Colours and fonts, as a plotly template; on the page the background is the page's."""
    ink, grid, paper = {
        "light": ("#1d2430", "#e3e7ee", "#ffffff"),
        "dark": ("#e4e8ef", "#333b48", "#171b22"),
    }[theme]
    axis = {"gridcolor": grid, "linecolor": grid, "tickcolor": grid}
    layout = {
        "font": {"color": ink, "size": 13, "family": "system-ui, 'Segoe UI', Roboto, Arial, sans-serif"},
        "paper_bgcolor": paper if standalone else "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": axis,
        "yaxis": axis,
        "colorway": list(COLORS),
        "hoverlabel": {"bgcolor": paper, "bordercolor": ink, "font": {"color": ink}, "align": "left"},
        "legend": {"bgcolor": "rgba(0,0,0,0)"},
        "shapedefaults": {"line": {"color": ink}},
    }
    return {"layout": layout}


def layout(x: str, y: str, *, xaxis: dict | None = None, yaxis: dict | None = None, **more) -> dict[str, Any]:
    """A plain layout with titled axes and the legend on top."""
    return {
        "xaxis": _AXIS | {"title": {"text": x}} | (xaxis or {}),
        "yaxis": _AXIS | {"title": {"text": y}} | (yaxis or {}),
        "margin": {"l": 56, "r": 14, "t": 14, "b": 46},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
    } | more


def layer_axis(layers: Sequence[int]) -> dict[str, Any]:
    """Whole numbers only, about ten of them."""
    return {"tick0": 0, "dtick": max(1, -(-len(set(layers)) // 12))}


def line(x: Sequence, y: Sequence, name: str, color: str, dash: str = "solid", **more) -> Trace:
    """A line with markers. Whatever is a name goes through `plain`, never into a hover template."""
    trace = {"type": "scatter", "mode": "lines+markers", "x": list(x), "y": list(y), "name": plain(name)}
    trace |= {"line": {"color": color, "dash": dash, "width": 2}, "marker": {"color": color, "size": 6}}
    return trace | more


def heat(z: Sequence, x: Sequence, y: Sequence, bar: str, hover: str, **more) -> Trace:
    """A heat map; `hover` is a plotly hover template."""
    colorbar = {"title": {"text": bar, "side": "right"}, "thickness": 12, "outlinewidth": 0}
    trace = {"type": "heatmap", "z": [list(row) for row in z], "x": list(x), "y": list(y)}
    trace |= {"colorscale": SCALE, "colorbar": colorbar, "hovertemplate": hover + "<extra></extra>"}
    return trace | {"hoverongaps": False, "xgap": 1, "ygap": 1} | more


def plain(text: str) -> str:
    """Text that plotly shows as it is, instead of reading tags in it."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def colored(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """Runs with their colours."""
    return list(zip(runs, itertools.cycle(COLORS)))


def modules_of(records: Sequence) -> list[str]:
    """The modules that occur, in the order of a layer."""
    found = {record.module for record in records}
    return [module for module in MODULES if module in found]


def steps_of(run: Run) -> list[int]:
    """The steps of a run's checkpoints; without steps, their numbers from 1."""
    return [i + 1 if g.step is None else g.step for i, g in enumerate(run.checkpoints)]


def by_place(records: Sequence, value) -> tuple[list[list], list[list[str]], list[int], list[str]]:
    """Values as modules down and layers across, with the names of the matrices; the mean where there are
    several, as with experts.

    Returns:
        (values, names, layers, modules)
    """
    records = [r for r in records if r.layer is not None]
    layers, modules = sorted({r.layer for r in records}), modules_of(records)
    values, names = [], []
    for module in modules:
        row = [[r for r in records if (r.layer, r.module) == (layer, module)] for layer in layers]
        values.append([mean([value(r) for r in cell]) for cell in row])
        more = [f" and {len(cell) - 1} more" * (len(cell) > 1) for cell in row]
        names.append([plain(cell[0].name) + m if cell else "" for cell, m in zip(row, more, strict=True)])
    return values, names, layers, modules


def mean(values: Sequence[float]) -> float:
    """The mean of what is finite; NaN without any."""
    kept = [value for value in values if np.isfinite(value)]
    return float(np.mean(kept)) if kept else float("nan")


def share(part: Sequence[MatrixGeometry], whole: Sequence[MatrixGeometry]) -> tuple[float, float]:
    """(share of ||dW||_F^2, share of the parameters) of some matrices among others; NaN of nothing."""
    found = []
    for size in (lambda r: r.frobenius**2, lambda r: r.shape[0] * r.shape[1]):
        total = sum(map(size, whole))
        found.append(float(sum(map(size, part)) / total) if total else float("nan"))
    return found[0], found[1]


def last_changed(run: Run) -> Geometry | None:
    """The last checkpoint; None if no attention or MLP matrix of it has changed."""
    return run.checkpoints[-1] if run.checkpoints[-1].select() else None


def chosen(variants: Sequence[tuple[str, Sequence[Trace]]], choice: str) -> dict[str, Any]:
    """The fields `data`, `variants` and `choice` of a figure."""
    variants = tuple((label, tuple(traces)) for label, traces in variants)
    several = variants if len(variants) > 1 else ()
    return {"data": variants[0][1], "variants": several, "choice": choice if several else ""}


def percent(value: float) -> str:
    """A share for people: 0.123 is 12%."""
    if not np.isfinite(value):
        return "an unknown share"
    digits = 0 if abs(value) >= 0.1 or value == 0 else 1
    return f"{100 * value:.{digits}f}%"
