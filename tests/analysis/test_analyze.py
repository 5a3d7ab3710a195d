"""Comparisons, the result and its files, and the command."""

import csv
import itertools
import json

import numpy as np
import pytest

from opd_jax import analysis
from opd_jax._analyze_cli import analyze as command
from opd_jax.analysis import _run
from tests.analysis.folders import random_tensors, write_folder


@pytest.fixture(scope="module")
def other(tmp_path_factory, way):
    """A second run from the same base."""
    _, tensors = way
    root, noise = tmp_path_factory.mktemp("other"), random_tensors(8)
    for step, size in ((5, 0.2), (9, 0.6)):
        write_folder(root / f"step_{step}", {n: tensors[0][n] + size * noise[n] for n in noise})
    return root


@pytest.fixture(scope="module")
def result(way, other):
    root, _ = way
    runs = {"opd": [root / "run"], "rl": [other]}
    scores = {"opd": {10: 0.2, 20: 0.5, 40: 0.9}, "rl": {5: 0.1, 9: 0.4}}
    return analysis.analyze(root / "base", runs, k=4, cache=None, scores=scores)


def test_bootstrap_is_that_of_all_draws():
    values = np.array([0.0, 1.0, 5.0, 2.0])
    every = [np.mean(draw) for draw in itertools.product(values, repeat=4)]
    low, high = analysis.bootstrap(values, samples=100_000, confidence=0.8)
    assert (low, high) == tuple(np.quantile(every, [0.1, 0.9]))
    assert np.isnan(analysis.bootstrap(np.zeros(0))).all()


def test_differences_are_paired_by_matrix(result):
    opd, rl = (run.checkpoints[-1] for run in result.runs)
    rows = {row["measure"]: row for row in result.comparison["measures"]}
    for measure, row in rows.items():
        a, b = (np.array([getattr(r, measure) for r in g.select()], float) for g in (opd, rl))
        assert row["opd"] == pytest.approx(a.mean()) and row["rl"] == pytest.approx(b.mean())
        assert row["difference"] == pytest.approx((b - a).mean()) and row["matrices"] == len(a) == 8
        assert row["low"] <= row["difference"] <= row["high"]
    assert rows["frobenius"]["high"] < 0  # 0.6 of the size
    assert rows["frobenius"]["reference_step"] == 40 and rows["frobenius"]["run_step"] == 9


def test_at_equal_norm_the_nearest_checkpoints_are_compared(result):
    norms = {run.name: {g.step: g.norm for g in run.checkpoints} for run in result.runs}
    smallest = norms["rl"][9]
    nearest = min(norms["opd"], key=lambda step: abs(norms["opd"][step] - smallest))
    row = result.comparison["equal_norm"][0]
    assert (row["reference_step"], row["run_step"]) == (nearest, 9) == (20, 9)


def test_scores_are_compared_at_norms_that_both_reach(result):
    norms = {run.name: [g.norm for g in run.checkpoints] for run in result.runs}
    rows = result.comparison["scores_at_norm"]
    assert rows[0]["norm"] == pytest.approx(max(n[0] for n in norms.values()))
    assert rows[-1]["norm"] == pytest.approx(min(n[-1] for n in norms.values()))
    for row in rows:
        expected = np.interp(row["norm"], norms["opd"], [0.2, 0.5, 0.9])
        assert row["opd"] == pytest.approx(expected)
        assert row["difference"] == pytest.approx(row["rl"] - expected)
    scores = {(row["run"], row["step"]): row["score"] for row in result.comparison["norms"]}
    assert scores["opd", 20] == 0.5 and len(scores) == 5


def test_layers_stand_side_by_side(result):
    rows = result.comparison["layers"]
    assert [(row["layer"], row["kind"][0]) for row in rows] == [(0, "a"), (1, "a"), (0, "m"), (1, "m")]
    opd = result.runs[0].checkpoints[-1]
    mine = np.linalg.norm([r.frobenius for r in opd.records if r.layer == 1 and r.kind == "mlp"])
    assert rows[3]["opd"] == pytest.approx(mine) and rows[3]["rl"] < rows[3]["opd"]


def test_results_come_back_from_json(result):
    text = result.to_json()
    again = analysis.Result.from_json(text)
    assert again == result and again.to_json() == text
    ours, theirs = result.runs[0].trajectory.records[2], again.runs[0].trajectory.records[2]
    np.testing.assert_allclose(theirs.heat, ours.heat, rtol=1e-5)
    full = analysis.Result.from_json(result.to_json(full=True)).runs[0].checkpoints[0].records[0]
    original = result.runs[0].checkpoints[0].records[0]
    assert full.top_ratio(0.5) == pytest.approx(original.top_ratio(0.5), rel=1e-5)
    with pytest.raises(ValueError, match="not a result"):
        analysis.Result.from_json('{"format": 99}')


def test_nothing_undefined_breaks_the_files(tmp_path, way):
    root, _ = way
    found = analysis.analyze(root / "base", {"a": [root / "base"] * 2}, steps={"a": [1, 2]}, cache=None)
    found.write(tmp_path)
    text = (tmp_path / "result.json").read_text()
    assert "NaN" not in text and analysis.Result.from_json(text).to_json() == text
    assert len(found.notes) == 2 and "all of them equal" in found.notes[0]
    for path in (tmp_path / "tables").glob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_the_command_writes_tables(tmp_path, way, other, capsys, monkeypatch):
    monkeypatch.setattr("opd_jax.analysis._images.write_images", lambda *_, **__: ())  # seconds, tested apart
    root, tensors = way
    out = tmp_path / "out"
    checkpoints = ",".join(str(root / "run" / f"checkpoint-{step}") for step in (20, 10, 40))
    arguments = ["--base", str(root / "base"), "--run", f"opd={checkpoints}", "--run", f"rl={other}/step_9"]
    arguments += ["--out", str(out), "--cache", str(tmp_path / "cache"), "--scores", "opd=0.1,0.2,0.4"]
    command(arguments)
    said = capsys.readouterr().out
    assert "rl has one checkpoint" in said and str(out / "tables") in said
    assert "report: " in said or "no report: " in said  # without plotly
    rows = list(csv.DictReader((out / "tables" / "matrices.csv").open()))
    assert len(rows) == 4 * 10
    last = next(r for r in rows if r["step"] == "40" and r["name"] == "lm_head.weight")
    dw = (tensors[40]["lm_head.weight"] - tensors[0]["lm_head.weight"]).astype(np.float64)
    assert float(last["spectral"]) == pytest.approx(np.linalg.norm(dw, 2), rel=1e-6)
    assert json.loads((out / "tables" / "matrices.json").read_text())[0]["name"] == rows[0]["name"]
    result = analysis.Result.from_json((out / "result.json").read_text())
    assert [g.step for g in result.runs[0].checkpoints] == [10, 20, 40]
    assert result.runs[0].scores == {10: 0.1, 20: 0.2, 40: 0.4}
    assert result.runs[1].trajectory is None and result.runs[1].checkpoints[0].step == 9


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (["--steps", "5,5,6"], "both are of step 5"),
        (["--steps", "5,6"], "3 checkpoints, but 2 steps"),
        (["--steps", "5,x,7"], "must be numbers"),
        (["--steps", "b=5"], "names run 'b'; there are a"),
        (["--scores", "1,2"], "3 checkpoints, but 2 scores"),
        (["--run", "a=x"], "same name"),
        (["--run", "b="], "must be NAME=CKPT"),
        (["--run", "b=/nowhere/at/all"], "no model at"),
        (["--base", "/nowhere/at/all"], "no model at"),
    ],
)
def test_what_the_command_refuses(tmp_path, way, change, match):
    root, _ = way
    arguments = ["--base", str(root / "base"), "--run", f"a={root / 'run'}", "--out", str(tmp_path / "o")]
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        command([*arguments, "--cache", "none", *change])


def test_several_checkpoints_without_steps(tmp_path, way):
    root, tensors = way
    folders = [write_folder(tmp_path / name, tensors[10]) for name in ("first", "second")]
    with pytest.raises(ValueError, match=r"run a: the step of .*first is None.*give the steps"):
        analysis.analyze(root / "base", {"a": folders}, cache=None)


def test_a_run_folder_tells_its_settings_and_scores(tmp_path, way):
    root, tensors = way
    run = tmp_path / "run"
    write_folder(run / "model", tensors[40])
    settings = "loss: reverse_kl\nsteps: 40\nbatch_size: 8\noptimizer: {learning_rate: 3.0e-5}\n"
    (run / "config.yaml").write_text(settings)
    lines = ['{"step": 0, "accuracy": 0.1}', '{"step": 40, "accuracy": 0.7}', '{"step": 40}', '{"st']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    for source in (run, run / "model"):
        (found,) = analysis.analyze(root / "base", {"a": [source]}, cache=None).runs
        assert found.info == {"loss": "reverse_kl", "steps": 40, "batch_size": 8, "learning_rate": 3e-5}
        assert found.scores == {40: 0.7} and found.checkpoints[0].step == 40


def test_folders_of_checkpoints(way, tmp_path):
    root, _ = way
    assert [path.name for path in _run.expand(root / "run")] == [f"checkpoint-{s}" for s in (10, 20, 40)]
    for alone in (root / "base", tmp_path, tmp_path / "nothing", {"up": np.ones((2, 2))}):
        assert _run.expand(alone) == [alone]
