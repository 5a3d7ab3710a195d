"""The report without a browser: its numbers, its words, its safety."""

import builtins
import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from opd_jax import analysis
from opd_jax._analyze_cli import analyze as command
from opd_jax.analysis import _images
from opd_jax.analysis._findings import findings
from tests.analysis.folders import random_tensors, write_folder
from tests.analysis.synthetic import synthetic

pytest.importorskip("plotly")
EVIL = "<script>document.title = 'x'</script>"
MATRICES = ("self_attn.q", "self_attn.k", "mlp.up", "mlp.down")


@pytest.fixture(scope="module")
def result(way, tmp_path_factory):
    """Two runs, one of them with a name that is code."""
    root, tensors = way
    noise = random_tensors(8)
    other = {n: tensors[0][n] + 0.6 * noise[n] for n in noise}
    folder = write_folder(tmp_path_factory.mktemp("other") / "step_9", other)
    scores = {"opd": {10: 0.2, 20: 0.5, 40: 0.9}}
    runs = {"opd": [root / "run"], EVIL: [folder]}
    return analysis.analyze(root / "base", runs, k=4, cache=None, scores=scores)


@pytest.fixture(scope="module")
def page(result):
    return analysis.report(result)


@pytest.fixture(scope="module")
def updates(way):
    """dW of every attention and MLP matrix by step, float64."""
    _, tensors = way
    names = [name for name in tensors[0] if re.search(r"_proj", name)]
    return {
        step: {name: (tensors[step][name] - tensors[0][name]).astype(np.float64) for name in names}
        for step in (10, 20, 40)
    }


def drawn(page, name):
    (text,) = re.findall(rf'<script type="application/json" id="data-{name}">(.*?)</script>', page)
    return json.loads(text)


def words(page):
    body = re.sub(r"<(script|style)[^>]*>.*?</\1>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", body)))


def test_energy_is_that_of_an_svd(page, updates):
    expected = []
    for dw in updates[40].values():
        s2 = np.linalg.svd(dw, compute_uv=False) ** 2
        expected.append([s2[: int(np.ceil(f * len(s2)))].sum() / s2.sum() for f in analysis.FRACTIONS])
    first = drawn(page, "concentration")["data"][0]
    np.testing.assert_allclose(first["x"], 100 * np.array(analysis.FRACTIONS))
    np.testing.assert_allclose(first["y"], 100 * np.mean(expected, 0), rtol=1e-4)


def test_alignment_is_that_of_singular_vectors(page, updates):
    cosines, ahead = [], []
    for step in (10, 20, 40):
        of = []
        for name, dw in updates[step].items():
            (u, _, _), (final, _, _) = (np.linalg.svd(x) for x in (dw, updates[40][name]))
            of.append(np.abs(np.sum(u[:, :4] * final[:, :4], 0)))
        cosines.append(np.mean(of))
        ahead.append(np.mean(of, 0)[0])
    curves = {trace["name"]: trace["y"] for trace in drawn(page, "lock_in")["data"]}
    np.testing.assert_allclose(curves["opd · leading 4 directions"], cosines, rtol=1e-3)
    np.testing.assert_allclose(curves["opd · first direction"], ahead, rtol=1e-3)


def test_norms_by_layer_and_share_by_module(page, updates):
    layers = drawn(page, "layers")["data"]
    mlp = next(trace for trace in layers if trace["name"] == "opd · MLP")
    for layer, norm in zip(mlp["x"], mlp["y"], strict=True):
        of = [dw for name, dw in updates[40].items() if f"layers.{layer}.mlp" in name]
        assert norm == pytest.approx(np.sqrt(sum(np.sum(dw**2) for dw in of)), rel=1e-4)
    total = sum(np.sum(dw**2) for dw in updates[40].values())
    sizes, bars = drawn(page, "modules")["data"][:2]
    for i, module in enumerate(bars["x"]):
        of = [dw for name, dw in updates[40].items() if f".{module}_proj" in name]
        assert bars["y"][i] == pytest.approx(100 * sum(np.sum(dw**2) for dw in of) / total, rel=1e-4)
        size = sum(dw.size for dw in of) / sum(dw.size for dw in updates[40].values())
        assert sizes["y"][i] == pytest.approx(100 * size, rel=1e-4)


def test_findings_say_what_the_arrays_say(page, updates):
    text = words(page)
    ratio = np.mean([np.linalg.norm(dw, 2) / np.linalg.norm(dw) for dw in updates[40].values()])
    noise = np.mean([1 / np.sqrt(dw.shape[0]) + 1 / np.sqrt(dw.shape[1]) for dw in updates[40].values()])
    assert f"holds {100 * ratio:.0f}% of its update's norm, against {100 * noise:.0f}% for noise" in text
    squares = {name: np.sum(dw**2) for name, dw in updates[40].items()}
    mlp = sum(v for name, v in squares.items() if ".mlp." in name) / sum(squares.values())
    assert f"{100 * mlp:.0f}% of the squared norm" in text
    early, late = ([np.linalg.norm(dw) for dw in updates[step].values()] for step in (10, 40))
    ranks = [np.argsort(np.argsort(x)) for x in (early, late)]
    assert f"Spearman's ρ is {np.corrcoef(*ranks)[0, 1]:.2f}" in text


def test_lock_in_step_in_words(result):
    locked = next(f for f in findings(result) if f.figure == "lock_in").answers[0]
    way = result.runs[0].trajectory
    step = way.lock_in(0.8)
    expected = "Not before the last checkpoint." if step == 40 else f"From step {step} of 40 on"
    assert locked.run == "opd" and locked.lead.startswith(expected)


def test_every_matrix_is_named_on_hover(page):
    boxes = drawn(page, "ratio")["data"][0]
    assert set(boxes["text"]) == {f"model.layers.{i}.{m}_proj.weight" for i in (0, 1) for m in MATRICES}
    (heat,) = drawn(page, "places")["data"]
    assert heat["customdata"][0] == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]


def test_names_are_text(page, result):
    scripts = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "script" and dict(attributes).get("type") != "application/json":
                scripts.append(attributes)

    Parser().feed(page)
    assert len(scripts) == 2 and EVIL not in page and html.escape(EVIL) in page
    names = [trace["name"] for trace in drawn(page, "concentration")["data"]]
    assert "&lt;script&gt;" in names[1]


def test_figures_have_names_words_and_traces(result):
    found = analysis.figures(result)
    assert len({figure.name for figure in found}) == len(found)
    for figure in found:
        assert figure.title and figure.definition and figure.alt and figure.data
        assert not figure.variants or (figure.variants[0][1] == figure.data and figure.choice)
        drawn_figure = figure.plotly("dark")
        assert len(drawn_figure.data) == len(figure.data)  # plotly knows every property
    sections = [figure.section for figure in found]
    order = [
        "findings",
        "table1",
        "norms",
        "layers",
        "spectra",
        "alignment",
        "paths",
        "settled",
        "comparison",
    ]
    assert list(dict.fromkeys(sections)) == order


def test_one_checkpoint_says_what_it_cannot_tell(way):
    root, _ = way
    alone = analysis.analyze(root / "base", {"a": [root / "run" / "checkpoint-40"]}, cache=None)
    text = words(analysis.report(alone))
    assert (
        text.count("One checkpoint cannot tell") == 2 and "needs a run with at least two checkpoints" in text
    )
    assert not any(figure.section in ("paths", "comparison") for figure in analysis.figures(alone))


def test_a_run_that_changed_nothing(way):
    root, _ = way
    same = analysis.analyze(root / "base", {"a": [root / "base"] * 2}, steps={"a": [1, 2]}, cache=None)
    text = words(analysis.report(same))
    assert (
        "No attention or MLP matrix differs from the base's" in text and "NaN" not in text.split("Made by")[0]
    )


def test_a_result_read_back_gives_the_same_page(result):
    again = analysis.Result.from_json(result.to_json())
    assert words(analysis.report(again)) == words(analysis.report(result))


def test_interventions_become_a_section(result, tmp_path):
    rows = [
        {"experiment": name, "setting": a, "score": a / 2, "error": 0.01, "norm": a}
        for name in ("mlp", "attention")
        for a in (0.0, 0.5, 1.0)
    ]
    assert analysis.with_interventions(result, tmp_path) == result  # none were made
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "intervention_scaling.json").write_text(json.dumps(rows))
    more = analysis.with_interventions(result, tmp_path)
    figure = next(figure for figure in analysis.figures(more) if figure.section == "interventions")
    assert figure.name == "intervention_scaling" and [t["name"] for t in figure.data] == ["mlp", "attention"]
    assert figure.data[0]["y"] == [0.0, 0.25, 0.5] and 'id="interventions"' in analysis.report(more)
    assert analysis.Result.from_json(more.to_json()).tables()["intervention_scaling"] == rows
    (tmp_path / "tables" / "intervention_swap.json").write_text('[{"setting": 1}]')
    with pytest.raises(ValueError, match=r"intervention_swap\.json is not a table of opd-jax intervene"):
        analysis.with_interventions(result, tmp_path)


def test_runs_of_equal_checkpoints_are_not_compared_twice(way):
    root, _ = way
    runs = {"a": [root / "run" / "checkpoint-40"], "b": [root / "run" / "checkpoint-20"]}
    found = {f.name: f for f in analysis.figures(analysis.analyze(root / "base", runs, cache=None))}
    assert "equal_norm" not in found and "no comparison at equal norm" in found["differences"].definition


def test_the_command_goes_on_without_plotly_and_without_a_browser(tmp_path, way, capsys, monkeypatch):
    root, _ = way
    monkeypatch.setattr(_images, "write_images", lambda *_, **__: ("no images: no browser",))
    arguments = ["--base", str(root / "base"), "--run", f"a={root / 'run'}", "--cache", "none", "--out"]
    command([*arguments, str(tmp_path / "one")])
    assert "no images: no browser\nreport: " in capsys.readouterr().out
    assert (tmp_path / "one" / "report.html").stat().st_size > 1e6
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == "plotly":
            raise ImportError("not here")
        return real(name, *rest, **more)

    for name in [n for n in __import__("sys").modules if n.split(".")[0] == "plotly"]:
        monkeypatch.delitem(__import__("sys").modules, name)
    monkeypatch.setattr("importlib.import_module", lambda name, *_: without(name))
    command([*arguments, str(tmp_path / "two")])
    said = capsys.readouterr().out
    assert "no report: " in said and "pip install 'opd_jax[analysis]'" in said
    assert (tmp_path / "two" / "tables" / "summary.csv").exists()


def test_synthetic_results_can_be_drawn():
    found = analysis.figures(synthetic(layers=3, checkpoints=4))
    assert {"u1_path", "first_last", "score_norm"} <= {figure.name for figure in found}
    empty = replace(synthetic(layers=1, checkpoints=2), notes=("a note",))
    assert "a note" in analysis.report(empty)
