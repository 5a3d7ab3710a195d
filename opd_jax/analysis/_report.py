"""The report: one HTML file that needs nothing else."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from opd_jax.analysis._compare import Table
from opd_jax.analysis._figure import Figure, colored, template
from opd_jax.analysis._figures import SECTIONS, SHORT, figures
from opd_jax.analysis._findings import Answer, Finding, findings
from opd_jax.analysis._result import Result, Run

_ROWS = 200
"""Of a table on the page; the files hold all."""
_TABLE1 = {
    "step": "step",
    "matrices": "matrices",
    "norm": "norm, all",
    "spectral": "spectral norm",
    "ratio": "spectral/Frobenius",
    "effective_rank": "effective rank",
    "numerical_rank": "rank",
    "top1_ratio": "top-1% ratio",
    "score": "score",
}
_PAPER = (
    ("spectral norm", "0.094 → 0.113", "0.007 → 0.009", "0.004 → 0.005", "0.056 → 0.063"),
    ("spectral/Frobenius", "33.2% → 39.6%", "19.7% → 25.7%", "32.7% → 36.8%", "24.4% → 28.1%"),
    ("effective rank", "964 → 778", "1908 → 1587", "2754 → 2341", "3174 → 2937"),
    ("top-1% norm ratio", "78.1% → 92.3%", "79.2% → 93.4%", "88.5% → 94.7%", "81.2% → 94.5%"),
)
_INTRO = {
    "table1": "Means over the attention and MLP matrices that have changed, as the paper's Table 1, and "
    "the same measures matrix by matrix. ΔW = W − W_base, with singular values s₁ ≥ s₂ ≥ …",
    "norms": "How far every checkpoint is from the base, and what score goes with it.",
    "layers": "Where in the model the update sits.",
    "spectra": "How the singular values of the updates fall off.",
    "alignment": "Singular directions along the way, compared with those of the last checkpoint.",
    "paths": "Where the strongest direction of a matrix went from checkpoint to checkpoint.",
    "settled": "The step at which directions stop changing.",
    "comparison": "What distinguishes runs from the same base.",
    "interventions": "The score when only a part of the update, or a changed one, is put into the base.",
    "notes": "",
}
_MISSING = {
    "norms": "Norms along the way need a run with at least two checkpoints; scores come from a run folder "
    "or from --scores.",
    "alignment": "This needs a run with at least two checkpoints.",
    "paths": "This needs a run with at least two checkpoints.",
    "settled": "This needs a run with at least two checkpoints.",
    "layers": "No matrix of a layer has changed.",
    "spectra": "No attention or MLP matrix has changed.",
}


def report(result: Result) -> str:
    """The report as one HTML file: findings in plain words, then every figure with its definition.

    It loads nothing, and its content security policy forbids that it could. Names are escaped.

    Args:
        result: of `analyze`, or read back from result.json.

    Raises:
        ImportError: without plotly.

    References:
        Cai et al., *Learning to Foresee*, `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    return page(result, figures(result))


def page(result: Result, drawn: Sequence[Figure]) -> str:
    """The report of figures that are made already."""
    from opd_jax._extras import require

    plotly = require("plotly.offline", "analysis").get_plotlyjs().replace("\r\n", "\n")
    files = resources.files("opd_jax.analysis") / "page"
    css, own = ((files / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    sections = [_section(name, result, drawn) for name in SECTIONS]
    kept = [(name, text) for name, text in zip(SECTIONS, sections, strict=True) if text]
    links = "".join(f'<li><a href="#{name}">{escape(SHORT[name])}</a></li>' for name, _ in kept)
    scripts = [plotly, own]
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
    policy += "base-uri 'none'; form-action 'none'"
    data = {f"data-{figure.name}": _drawable(figure) for figure in drawn}
    data["themes"] = {theme: template(theme) for theme in ("light", "dark")}
    blocks = "".join(
        f'<script type="application/json" id="{escape(name)}">{_json(value)}</script>\n'
        for name, value in data.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>What training did to the weights: {escape(", ".join(run.name for run in result.runs))}</title>
<link rel="icon" href="data:,">
<style>{css}</style>
</head>
<body>
<a class="skip" href="#findings">Skip to the findings</a>
{_header(result)}
<nav aria-label="Sections"><div><ul>{links}</ul>
<button id="theme" type="button" aria-pressed="false">◐ Dark</button></div></nav>
<main>
{"".join(text for _, text in kept)}
</main>
<footer>Made by <code>opd-jax analyze</code>. Every table is beside this file in <code>tables/</code>,
as CSV and JSON; every figure in <code>figures/</code>, as PNG and SVG, where a browser was there to draw it.
The measures are those of Cai et al., <em>Learning to Foresee</em>, arXiv 2605.11739.</footer>
{blocks}<script>{plotly}</script>
<script>{own}</script>
</body>
</html>
"""


def _header(result: Result) -> str:
    runs = "".join(f"<li>{_described(run)}</li>" for run in result.runs)
    return f"""<header>
<h1>What training did to the weights</h1>
<p>Updates ΔW = W − W<sub>base</sub> of {len(result.runs)} run{"s" * (len(result.runs) > 1)} from the base
<code>{escape(str(result.base))}</code>.</p>
<ul>{runs}</ul>
</header>"""


def _described(run: Run) -> str:
    last = run.checkpoints[-1]
    steps = [str(g.step) for g in run.checkpoints if g.step is not None]
    text = f"<strong>{escape(run.name)}</strong>: {len(run.checkpoints)} checkpoint"
    text += "s" * (len(run.checkpoints) > 1)
    if steps:
        text += f" at step{'s' * (len(steps) > 1)} {', '.join(steps)}"
    text += f", {len(last.records)} matrices"
    info = [f"{key.replace('_', ' ')} {value}" for key, value in run.info.items()]
    return text + (f"; {escape(', '.join(info))}" if info else "")


def _section(name: str, result: Result, drawn: Sequence[Figure]) -> str:
    here = [figure for figure in drawn if figure.section == name]
    if name == "findings":
        by_name = {figure.name: figure for figure in here}
        colors = {run.name: color for run, color in colored(result.runs)}
        inside = "".join(_finding(each, by_name.get(each.figure), colors) for each in findings(result))
    elif name == "notes":
        inside = _notes(result)
    elif not here and name not in _MISSING:
        return ""
    else:
        before = _table1(result) if name == "table1" else ""
        inside = before + f'<div class="grid">{"".join(map(_figure, here))}</div>'
        inside = inside if here else f"<p>{escape(_MISSING[name])}</p>"
    intro = f"<p>{_names(_INTRO[name])}</p>" if here and _INTRO.get(name) else ""
    title = escape(SECTIONS[name])
    return (
        f'<section id="{name}" aria-labelledby="h-{name}">\n<h2 id="h-{name}">{title}</h2>\n'
        f"{intro}{inside}\n</section>\n"
    )


def _finding(finding: Finding, figure: Figure | None, colors: Mapping[str, str]) -> str:
    answers = "".join(_answer(answer, colors) for answer in finding.answers)
    drawing = "" if figure is None else _figure(figure, level=4)
    return (
        f'<article class="card finding"><div><h3>{escape(finding.question)}</h3>{answers}'
        f'<p class="caveat">{escape(finding.caveat)}</p></div>{drawing}</article>\n'
    )


def _answer(answer: Answer, colors: Mapping[str, str]) -> str:
    dot = f'<span class="dot" style="background:{colors[answer.run]}"></span>' if answer.run in colors else ""
    name = f'<span class="run">{dot}{escape(answer.run)}</span> ' if answer.run else ""
    rest = f" {escape(answer.rest)}" if answer.rest else ""
    return f"<p>{name}<strong>{escape(answer.lead)}</strong>{rest}</p>"


def _figure(figure: Figure, level: int = 3) -> str:
    name = escape(figure.name)
    choice = ""
    if figure.variants:
        options = "".join(f"<option>{escape(label)}</option>" for label, _ in figure.variants)
        choice = (
            f'<div class="choice"><label for="choose-{name}">{escape(figure.choice)}</label>'
            f'<select id="choose-{name}" data-plot="plot-{name}">{options}</select></div>'
        )
    formula = f'<p class="formula">{_math(figure.formula)}</p>' if figure.formula else ""
    numbers = ""
    if figure.table:
        numbers = (
            f"<details><summary>Numbers of this figure</summary>{table(figure.table, figure.title)}</details>"
        )
    label = escape(f"{figure.alt}. Arrow keys walk through the points.")
    return (
        f"<figure><h{level}>{escape(figure.title)}</h{level}>{choice}"
        f'<div class="plot" id="plot-{name}" data-name="{name}" tabindex="0" role="img" '
        f'aria-label="{label}"></div>'
        f'<p class="spoken" aria-live="polite"></p><figcaption><p class="definition">'
        f"{_names(figure.definition)}</p>{formula}</figcaption>{numbers}</figure>\n"
    )


def _table1(result: Result) -> str:
    rows: Table = []
    for run in result.runs:
        last = run.checkpoints[-1]
        if last.select():
            found = {"step": last.step, "norm": last.norm, "score": run.scores.get(last.step)} | last.mean()
            rows.append({"run": run.name} | {title: found[key] for key, title in _TABLE1.items()})
    if not rows:
        return ""
    sizes = ("", "1.5B", "4B", "8B", "14B")
    paper = [dict(zip(sizes, row, strict=True)) for row in _PAPER]
    return (
        table(rows, "Means at the last checkpoint")
        + "<details><summary>The paper's values, RL → OPD</summary><p>Of other models and data than yours: "
        f"for orientation only.</p>{table(paper, 'Table 1 of arXiv 2605.11739')}</details>"
    )


def _notes(result: Result) -> str:
    rows = [
        {"run": run.name, "step": g.step, "matrix": name, "why": why}
        for run in result.runs
        for g in run.checkpoints
        for name, why in g.skipped
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    listed = f'<ul class="notes">{notes}</ul>' if notes else ""
    if not rows:
        return (
            listed
            + "<p>Every matrix of the base was compared. Vectors, such as norms and biases, are not.</p>"
        )
    return listed + table(rows, "Tensors that were left out")


def table(rows: Table, caption: str) -> str:
    """An HTML table that scrolls sideways where it must."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c for c in columns if all(isinstance(r.get(c), int | float | None) for r in rows)}
    kind = {c: ' class="number"' if c in numeric else "" for c in columns}
    head = "".join(f'<th scope="col"{kind[c]}>{escape(str(c))}</th>' for c in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td{_kind(row.get(c), kind[c])}>{escape(_cell(row.get(c)))}</td>" for c in columns)
        + "</tr>"
        for row in rows[:_ROWS]
    )
    more = f"<p>The first {_ROWS} of {len(rows)} rows; the files in tables/ have all.</p>" * (
        len(rows) > _ROWS
    )
    label = escape(caption)
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}"
    )


def _kind(value: Any, kind: str) -> str:
    return ' class="long"' if isinstance(value, str) and len(value) > 60 else kind


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if value == int(value) else f"{value:.4g}"
    return str(value)


def _drawable(figure: Figure) -> dict[str, Any]:
    found = {"data": figure.data, "layout": figure.layout}
    return found | {"variants": [traces for _, traces in figure.variants]}


def _json(value: Any) -> str:
    """JSON that can stand in a script element."""
    text = json.dumps(_short(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _short(value: Any) -> Any:
    """Plain values, numbers with five digits, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _short(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple | range):
        return [_short(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def _math(formula: str) -> str:
    """A formula with its subscripts; `_x`, `_word` or `_{...}`."""
    return re.sub(r"_(?:\{([^}]+)\}|(\w+))", r"<sub>\1\2</sub>", escape(formula))


def _names(words: str) -> str:
    """Words with the subscripts of the symbols in them."""
    return re.sub(r"\b(Δ?W|u|U)_(base|t|T|k|1)\b", r"\1<sub>\2</sub>", escape(words))


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
