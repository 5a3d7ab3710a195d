"""opd-jax intervene: scores, going on, what is written and what is refused."""

import csv
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from opd_jax import _intervene_score as scores
from opd_jax import analysis, cli, models, parallel, rollout, tasks
from opd_jax._intervene_cli import intervene as command
from opd_jax.training._checkpoint import Checkpoints
from tests.training.runs import make_folder

DEMO = Path(models.__file__).parents[1] / "demo"
TASK = ["--source", "arithmetic", "--options", "{split: held_out, seed: 0, size: 24}"]
TASK += ["--max-new-tokens", "32", "--batch-size", "16"]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The virtual devices compete for two cores."""
    make_mesh = functools.partial(parallel.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(parallel, "make_mesh", make_mesh)


def run(out, *more, base=DEMO / "base", tuned=DEMO / "teacher"):
    command(["--base", str(base), "--tuned", str(tuned), "--out", str(out), *TASK, *more])


def table(out, name):
    return list(csv.DictReader((out / "tables" / f"intervention_{name}.csv").open()))


@pytest.fixture(scope="module")
def evaluator():
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    paths = [str(DEMO / "teacher")]
    return scores.read(str(DEMO / "base"), paths, dtype=None, mesh=mesh, say=lambda _: None)


@pytest.fixture(scope="module")
def sampling():
    tokenizer = models.load_tokenizer(DEMO / "base")
    task = tasks.load("arithmetic", options=dict(split="held_out", seed=0, size=24))
    prompts = tasks.Prompts(task, tokenizer, batch_size=16, max_prompt_length=16, shuffle=False)
    return scores.Sampling(prompts, models.stop_token_ids(DEMO / "base", tokenizer), 32, 1.0, 5)


@pytest.mark.slow
def test_accuracy_is_that_of_the_saved_folder(tmp_path, capsys):
    alpha = ["--experiments", "scale", "--alphas", "0.5", "--repeats", "2", "--seed", "3"]
    run(tmp_path, *alpha, "--save", "scale/alpha=0.5")
    folder = tmp_path / "models" / "scale-alpha=0.5"
    assert str(folder) in capsys.readouterr().out
    base, tuned, saved = (
        load_file(p / "model.safetensors") for p in (DEMO / "base", DEMO / "teacher", folder)
    )
    for name in saved:
        assert saved[name].tobytes() == (base[name] + np.float32(0.5) * (tuned[name] - base[name])).tobytes()
    lines = (tmp_path / "interventions.jsonl").read_text().splitlines()
    for seed, line in zip((3, 4), lines, strict=True):
        options = "{split: held_out, seed: 0, size: 24}"
        cli.evaluate(str(folder), "arithmetic", options, max_new_tokens=32, batch_size=24, seed=seed)
        assert f"accuracy {np.mean(json.loads(line)['values']):.4f} +-" in capsys.readouterr().out
    (row,) = table(tmp_path, "scale")
    assert list(row) == ["experiment", "setting", "score", "error", "norm"]
    assert float(row["score"]) == pytest.approx(np.mean([json.loads(line)["values"] for line in lines]))
    assert (
        json.loads((tmp_path / "tables" / "intervention_scale.json").read_text())[0]["setting"] == "alpha=0.5"
    )


@pytest.mark.slow
def test_the_kl_is_that_of_all_logits(evaluator, sampling):
    judge, (base, tuned) = evaluator
    teacher = models.load(DEMO / "teacher", mesh=judge.mesh)
    edited = analysis.scale(base.params, tuned.params, 0.25)
    values = scores.Divergence(judge, base.params, teacher, sampling, lambda _: None)(edited, 2)
    prompts = sampling.prompts.take(range(24))
    drawn = rollout.generate(
        models.load(DEMO / "base"),
        prompts.tokens,
        jax.random.key(5 + 2),
        prompt_lengths=prompts.lengths,
        max_new_tokens=32,
        stop_token_ids=sampling.stops,
        row_ids=prompts.ids,
    )
    ids, mask = np.asarray(drawn.completions), np.asarray(drawn.mask)
    lines = np.zeros((24, prompts.tokens.shape[1] + 32), np.int32)
    for line, row, size, answer in zip(lines, prompts.tokens, prompts.lengths, ids, strict=True):
        line[: size + 32] = [*row[:size], *answer]
    logits = [np.asarray(nnx.jit(lambda m, x: m(x)[0])(m, lines)) for m in (judge.model(edited), teacher)]
    mine, theirs = (np.asarray(jax.nn.log_softmax(x)) for x in logits)
    kl = (np.exp(mine) * (mine - theirs)).sum(-1)
    sums = np.array([k[n - 1 :][:32][m].sum() for k, n, m in zip(kl, prompts.lengths, mask, strict=True)])
    counts = mask.sum(-1)
    ratio = sums.sum() / counts.sum()
    assert values.shape == (24,) and values.mean() == pytest.approx(ratio, rel=1e-4)
    expected = np.std(sums - ratio * counts, ddof=1) / np.sqrt(24) / counts.mean()
    assert values.std(ddof=1) / np.sqrt(24) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("score", ["accuracy", "kl"])
def test_nothing_compiles_after_the_first_edit(evaluator, sampling, compilations, score):
    judge, (base, tuned) = evaluator
    if score == "accuracy":
        scored = scores.Accuracy(judge, sampling, lambda _: None)
    else:
        teacher = models.load(DEMO / "teacher", mesh=judge.mesh)
        scored = scores.Divergence(judge, base.params, teacher, sampling, lambda _: None)
    wanted = analysis.edits(base.params, tuned.params, half_width=0, percents=[10])
    analysis.intervene(base.params, wanted[:1], scored)
    rest = [each for each in wanted if each.setting in ("alpha=0.5", "embeddings=base", "mlp=0", "top=10%")]
    assert len(rest) == 4
    with compilations() as compiled:
        found = analysis.intervene(base.params, rest, scored, repeats=2)
    assert not compiled and len(found) == 4


def test_a_stopped_command_goes_on(tmp_path, monkeypatch, capsys):
    arguments = ["--experiments", "scale,window", "--half-width", "1", "--repeats", "2", "--prompts", "4"]
    calls = []

    def counted(self, params, repeat):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(repeat)
        return np.random.default_rng(repeat).normal(size=4) + float(params["norm"]["scale"].get_value()[0])

    monkeypatch.setattr(scores.Accuracy, "__call__", counted)
    stop = -1
    run(tmp_path / "whole", *arguments)
    total = len(calls)
    assert total == 2 * (5 + 2 * 4)  # the base and the tuned model are alphas 0 and 1
    calls.clear()
    stop = 7
    full = ["intervene", "--base", str(DEMO / "base"), "--tuned", str(DEMO / "teacher")]
    full += ["--out", str(tmp_path / "parts"), *TASK, *arguments]
    assert cli.main(full) == 130
    said = capsys.readouterr().err
    assert "To go on" in said and "opd-jax intervene --base" in said
    journal = tmp_path / "parts" / "interventions.jsonl"
    assert len(journal.read_text().splitlines()) == 7
    journal.write_text(journal.read_text()[:-9])  # the last line was being written
    stop = -1
    assert cli.main(full) == 0 and len(calls) == total + 1
    for name in ("scale", "window"):
        assert table(tmp_path / "parts", name) == table(tmp_path / "whole", name)
    assert cli.main(full) == 0 and len(calls) == total + 1
    assert cli.main([*full, "--seed", "1"]) == 1
    assert "holds evaluations with another seed (seed was 0, now it is 1)" in capsys.readouterr().err


def save_step(folder, step, model):
    checkpoints = Checkpoints(folder, keep=9)
    checkpoints.save(step, {"params": nnx.state(model, nnx.Param)}, {})
    checkpoints.wait()
    checkpoints.close()
    return folder / str(step)


def test_norms_start_from_a_training_step(tmp_path):
    base, tuned = (models.load(DEMO / name) for name in ("base", "teacher"))
    half = analysis.scale(base, tuned, 0.5)
    model = nnx.merge(nnx.graphdef(base), jax.tree.map(jnp.asarray, half))
    early = save_step(tmp_path / "checkpoints", 3, model)
    arguments = ["--experiments", "norms", "--early", str(early), "--prompts", "16", "--repeats", "1"]
    run(tmp_path / "out", *arguments, "--betas", "0,1", "--save", "norms/beta=0", "--save", "norms/beta=1")
    rows = {row["setting"]: float(row["norm"]) for row in table(tmp_path / "out", "norms")}
    assert list(rows) == ["base", "tuned", "early", "beta=0", "beta=1"]
    assert rows["early"] == rows["beta=0"] == pytest.approx(rows["tuned"] / 2, rel=1e-5)
    assert rows["beta=1"] == pytest.approx(rows["tuned"], rel=1e-5)
    start, end = (
        load_file(tmp_path / "out" / "models" / f"norms-beta={b}" / "model.safetensors") for b in (0, 1)
    )
    goal = load_file(DEMO / "teacher" / "model.safetensors")
    models.save(model, tmp_path / "half")
    expected = load_file(tmp_path / "half" / "model.safetensors")
    for name in goal:
        assert start[name].tobytes() == expected[name].tobytes()
        np.testing.assert_allclose(end[name], goal[name], atol=1e-6)  # all of it is on one line


@pytest.mark.slow
def test_an_adapter_is_merged(tmp_path):
    base = make_folder(tmp_path / "base", 0)
    model = models.add_lora(models.load(base), rank=2, alpha=4, targets=("q", "up"), key=jax.random.key(0))
    for linear in (model.layers.attention.q, model.layers.mlp.up):
        b = linear.adapter.lora_b
        b.set_value(jax.random.normal(jax.random.key(1), b.shape))
    models.save_lora(model, tmp_path / "adapter")
    few = ["--experiments", "scale", "--alphas", "1", "--prompts", "4", "--repeats", "1"]
    run(tmp_path / "out", *few, "--save", "scale/alpha=1", base=base, tuned=tmp_path / "adapter")
    models.save(models.merge_lora(model), tmp_path / "merged")
    found = load_file(tmp_path / "out" / "models" / "scale-alpha=1" / "model.safetensors")
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        np.testing.assert_array_equal(found[name], value)


def test_mixed_dtypes_are_evaluated_in_float32(tmp_path):
    base = make_folder(tmp_path / "base", 0)
    models.save(models.load(base, dtype=jnp.bfloat16), tmp_path / "tuned")
    mesh = parallel.make_mesh()
    how = dict(dtype=None, mesh=mesh, say=lambda _: None)
    _, both = scores.read(base, [str(tmp_path / "tuned")], **how)
    assert {leaf.dtype for each in both for leaf in jax.tree.leaves(each.params)} == {np.dtype(np.float32)}
    _, both = scores.read(str(tmp_path / "tuned"), [str(tmp_path / "tuned"), None], **how)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(both[1].params)} == {"bfloat16"} and both[2] is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (["--experiments", "scale,windows"], "no 'windows'; there are scale, swap"),
        (["--experiments", ","], "--experiments is empty"),
        (["--experiments", "norms"], "needs --early"),
        (["--experiments", "swap", "--early", "x"], "--early is for the experiment norms"),
        (["--alphas", ""], "--alphas '' must be finite numbers, at least one"),
        (["--alphas", "0,x"], "--alphas '0,x' must be numbers"),
        (["--alphas", "nan"], "--alphas 'nan' must be finite"),
        (["--half-width", "-1"], "--half-width must be at least 0, got -1"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--temperature", "-1"], "--temperature must be 0 or more, got -1"),
        (["--options", "3"], "must be a mapping"),
        (["--percents", "0"], "--percents must be above 0 and at most 100, got 0"),
        (
            ["--save", "scale/alpha=7"],
            "--save scale/alpha=7 is no edit of this command; there are scale/alpha=0",
        ),
        (["--tuned", "/nowhere/at/all"], "no model at"),
        (["--source", "arithmetics"], "arithmetics"),
    ],
)
def test_what_the_command_refuses(tmp_path, change, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        run(tmp_path / "out", *change)
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused(tmp_path):
    other = make_folder(tmp_path / "other", 0)
    with pytest.raises(ValueError, match=r"different architectures: .*width is 96 in .* and 16 in"):
        run(tmp_path / "out", tuned=other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a model"):
        run(tmp_path / "out", tuned=tmp_path / "empty")
