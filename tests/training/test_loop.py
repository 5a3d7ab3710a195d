"""The loop end to end on a model of a few thousand parameters."""

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opd_jax import config as configs
from opd_jax import models, training
from opd_jax.cli import main
from opd_jax.tasks import arithmetic
from opd_jax.training import _checkpoint, _loop, _setup
from opd_jax.training._objectives import Term
from tests.training.runs import assert_same, read_metrics, read_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("loss", ["reverse_kl", "sampled_reverse_kl"])
def test_distillation_lowers_the_divergence_and_writes_everything(make, loss):
    settings = make(
        loss=loss,
        steps=25 if loss == "reverse_kl" else 60,
        batch_size=32,
        evaluation__prompts=12,
        evaluation__options=dict(seed=5),
    )
    settings = dataclasses.replace(
        settings, evaluation=dataclasses.replace(settings.evaluation, samples=2, pass_k=(1, 2), teacher=True)
    )
    result = training.train(settings)
    lines = read_metrics(settings.run_dir, timings=True)
    kl = [line["kl"] for line in lines if "kl" in line]
    assert np.mean(kl[-5:]) < 0.7 * np.mean(kl[:5])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, settings.steps + 1))
    for name in [
        "kl",
        "student_entropy",
        "teacher_entropy",
        "top16_overlap",
        "top16_mass",
        "sampler_difference",
        "clip_rate",
        "truncation_rate",
        "eos_rate",
        "completion_length",
        "gradient_norm",
        "update_norm",
        "finite",
        "tokens",
        "rollout_tokens_per_second",
        "scoring_tokens_per_second",
        "update_tokens_per_second",
        "rollout_share",
        "scoring_share",
        "update_share",
    ]:
        assert np.isfinite(steps[-1][name]), name
    assert sum(steps[-1][f"{part}_share"] for part in ("rollout", "scoring", "update")) == pytest.approx(1)
    assert max(line["sampler_difference"] for line in steps) < 1e-4
    assert set(result.after) >= {"accuracy", "accuracy_error", "pass@1", "pass@2"} <= set(result.teacher)
    names = {path.name for path in Path(settings.run_dir).iterdir()}
    assert {"config.yaml", "versions.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model"} <= names
    assert configs.load(Path(settings.run_dir) / "config.yaml") == settings
    # The exported folder is the trained model, not the one it started from.
    tokens = jnp.arange(3, 13)[None]
    before, after = (models.load(path).logits(tokens) for path in (settings.student.path, result.model))
    assert jnp.abs(before - after).max() > 1e-2


def test_a_loss_value_is_the_divergence_it_names(make):
    training.train(make(steps=2))
    for line in read_metrics(make().run_dir):
        assert line["loss"] == pytest.approx(line["kl"], rel=1e-5)


def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(make):
    held_out = dict(evaluation__prompts=8, evaluation__options=dict(seed=5))
    whole = training.train(make("whole", steps=6, **held_out))
    training.train(make("parts", steps=3, **held_out))
    parts = training.train(make("parts", steps=6, **held_out))
    assert_same(read_weights(whole.model), read_weights(parts.model))
    lines = read_metrics(make("parts").run_dir)
    # The stopped run evaluated once more, at its own end; nothing else differs.
    kept = [line for line in lines if not (line["step"] == 3 and "accuracy" in line)]
    assert kept == read_metrics(make("whole").run_dir)


def test_ctrl_c_saves_and_the_same_call_goes_on(make, monkeypatch):
    step = _loop._Run._one_step

    def interrupted(run):
        if run.step == 2 and run.saved == 0:
            signal.raise_signal(signal.SIGINT)
        return step(run)

    whole = training.train(make("whole"))
    monkeypatch.setattr(_loop._Run, "_one_step", interrupted)
    with pytest.raises(training.Interrupted, match="stopped after step 2 of 4"):
        training.train(make("parts"))
    assert not (Path(make("parts").run_dir) / "model").exists()
    parts = training.train(make("parts"))
    assert_same(read_weights(whole.model), read_weights(parts.model))
    assert read_metrics(make("parts").run_dir) == read_metrics(make("whole").run_dir)


def test_a_second_ctrl_c_keeps_state_and_step_together(make, monkeypatch):
    """It mostly comes while the host waits for the numbers of an update that is under way."""
    whole = training.train(make("whole"))
    with monkeypatch.context() as patch:

        def interrupt(value):
            raise KeyboardInterrupt  # as Python does on SIGINT; test workers ignore the signal itself

        patch.setattr(_loop, "float", interrupt, raising=False)
        patch.setattr(_loop, "on_signal", lambda ask: contextlib.nullcontext())
        with pytest.raises(KeyboardInterrupt):
            training.train(make("parts"))
    assert not (Path(make("parts").run_dir) / "model").exists()
    parts = training.train(make("parts"))
    assert_same(read_weights(whole.model), read_weights(parts.model))


def test_a_crash_loses_nothing(make, monkeypatch):
    make_batch = _loop.make_batch

    def broken(setup, params, step, *rest):
        if step == 3:
            raise RuntimeError("the verifier has a bug")
        return make_batch(setup, params, step, *rest)

    monkeypatch.setattr(_loop, "make_batch", broken)
    with pytest.raises(RuntimeError, match="verifier has a bug"):
        training.train(make())
    monkeypatch.setattr(_loop, "make_batch", make_batch)
    resumed, whole = training.train(make()), training.train(make("whole"))
    assert_same(read_weights(whole.model), read_weights(resumed.model))


def test_non_finite_steps_change_nothing_and_stop_the_run(make, monkeypatch):
    monkeypatch.setattr(
        _setup,
        "make_objective",
        lambda config: (Term("nan", lambda tokens: jnp.nan * tokens.student.sum(-1)),),
    )
    settings = make(max_bad_steps=3, steps=10, optimizer__learning_rate=1.0)
    with pytest.raises(training.TrainingError, match="not finite in the last 3 steps"):
        training.train(settings)
    run_dir = Path(settings.run_dir)
    assert sorted(path.name for path in run_dir.glob("bad_batch_*.npz")) == [
        f"bad_batch_{step}.npz" for step in (1, 2, 3)
    ]
    with np.load(run_dir / "bad_batch_1.npz") as batch:
        assert batch["completions"].shape == (8, 8) and batch["mask"].any()
    assert [line["finite"] for line in read_metrics(settings.run_dir)] == [0, 0, 0]
    # The model and the checkpoint hold the parameters as they were.
    assert_same(read_weights(run_dir / "model"), read_weights(Path(settings.student.path)))
    student = nnx.split(models.load(settings.student.path))[1]
    _, state = _setup.prepare(settings, training._loop.Display(1))
    checkpoints = _checkpoint.Checkpoints(run_dir / "checkpoints", 2)
    _, state, _ = checkpoints.restore(state)
    checkpoints.close()
    for old, new in zip(jax.tree.leaves(student), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_full_disk_is_told_and_the_next_step_saves(make, monkeypatch, capsys):
    usage, free = shutil.disk_usage, iter([10, 10])

    def full(path):
        return usage(path)._replace(free=next(free, usage(path).free))

    monkeypatch.setattr(_checkpoint.shutil, "disk_usage", full)
    training.train(make(checkpoint__every=1))
    out = capsys.readouterr().out
    assert out.count("no room for the checkpoint") == 2
    assert "step 1" in out and "trying again after the next step" in out


def test_a_disk_that_stays_full_fails_at_the_end_and_names_the_last_checkpoint(make, monkeypatch):
    training.train(make(steps=2))
    usage = shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(_checkpoint.shutil, "disk_usage", lambda path: usage(path)._replace(free=10))
        with pytest.raises(training.TrainingError, match="newest checkpoint is that of step 2"):
            training.train(make(steps=4))
    assert_same(read_weights(training.train(make()).model), read_weights(training.train(make("whole")).model))


def test_nothing_compiles_after_the_second_step(make, monkeypatch):
    compiled, steps = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    step = _loop._Run._one_step

    def counted(run):
        before = len(compiled)
        metrics = step(run)
        steps.append(len(compiled) - before)
        return metrics

    monkeypatch.setattr(_loop._Run, "_one_step", counted)
    training.train(make(steps=6, evaluation__prompts=4, evaluation__options=dict(seed=5)))
    assert steps[0] > 0 and steps[2:] == [0, 0, 0, 0]


def _assert_same_step(a: configs.Config, b: configs.Config) -> None:
    """Of one step: Adam's first steps are signs, which turn rounding into differences of any later step."""
    (first,), (second,) = ([m for m in read_metrics(c.run_dir) if "loss" in m] for c in (a, b))
    for name in ("loss", "kl", "gradient_norm", "completion_length", "student_entropy"):
        assert first[name] == pytest.approx(second[name], rel=2e-5), name


@pytest.mark.parametrize("changes", [dict(micro_batches=4), dict(loss_chunk=3), dict(student__remat="block")])
def test_how_the_work_is_cut_does_not_change_the_result(make, changes):
    plain, cut = make("plain", steps=1), make("cut", steps=1, **changes)
    training.train(plain), training.train(cut)
    _assert_same_step(plain, cut)


@pytest.fixture(scope="module")
def step_on_one_device():
    """Config and weights of a step with a search on one device, once the first test has made them."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 2, 1), (2, 1, 2), (2, 2, 2)])
def test_the_mesh_does_not_change_the_result(
    make, one_device, step_on_one_device, capsys, data, fsdp, tensor
):
    """On 1, 2, 4 and 8 devices the same tokens, and up to rounding the same loss, search and weights."""
    search = configs.ForesightConfig(
        extrapolate=configs.ExtrapolateConfig(schedule="steps", steps=(1,), prompts=8, factors=(2.0, 4.0))
    )
    # A large eps: with Adam's own the first step is the gradient's sign, and rounding decides that of a zero.
    common = dict(steps=1, foresight=search, evaluation__prompts=8, optimizer__eps=0.1)
    common |= dict(evaluation__options=dict(seed=5), logging__samples=8)
    if not step_on_one_device:
        settings = make("one", **common)
        step_on_one_device["weights"] = read_weights(training.train(settings).model)
        step_on_one_device["config"] = settings
    one_device.undo()
    mesh = configs.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    devices = jax.devices()[: data * fsdp * tensor]
    one_device.setattr(_setup, "make_mesh", functools.partial(_setup.make_mesh, devices=devices))
    cut = make("mesh", micro_batches=2, mesh=mesh, **common)
    weights = read_weights(training.train(cut).model)
    assert (
        f"on each of {len(devices)} devices (data={data} fsdp={fsdp} tensor={tensor})"
        in capsys.readouterr().out
    )
    plain = step_on_one_device["config"]
    _assert_same_step(plain, cut)
    one, other = ((Path(c.run_dir) / "samples.jsonl").read_text() for c in (plain, cut))
    assert one == other and one.count("\n") >= 16
    for name, expected in step_on_one_device["weights"].items():
        np.testing.assert_allclose(weights[name], expected, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_supervised_training_learns_its_demonstrations(make):
    settings = make(
        objective="sft", teacher=configs.TeacherConfig(), steps=200, max_new_tokens=40, batch_size=32
    )
    training.train(settings)
    losses = [line["loss"] for line in read_metrics(settings.run_dir)]
    assert np.mean(losses[-10:]) < 0.6 * np.log(19)  # 19 tokens, all equally likely: no skill at all


def test_grpo_raises_the_reward(make, monkeypatch):
    """A verifier that pays for short completions: sampling must get shorter."""
    monkeypatch.setattr(
        type(arithmetic.make(size=1)),
        "verify",
        lambda self, completion, example: float(len(completion) < 4),
    )
    settings = make(
        objective="grpo",
        teacher=configs.TeacherConfig(),
        steps=30,
        batch_size=64,
        samples_per_prompt=8,
    )
    training.train(settings)
    rewards = [line["reward"] for line in read_metrics(settings.run_dir)]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2
    assert all(0 <= line["constant_groups"] <= 1 for line in read_metrics(settings.run_dir))


def test_grpo_reports_its_divergence_from_the_reference(make, folders):
    settings = make(
        objective="grpo",
        teacher=configs.TeacherConfig(path=folders[0]),
        kl_coefficient=0.1,
        samples_per_prompt=4,
        steps=3,
    )
    training.train(settings)
    kl = [line["kl"] for line in read_metrics(settings.run_dir)]
    assert kl[0] == pytest.approx(0, abs=1e-6) and all(value >= -1e-6 for value in kl)


def test_a_teacher_with_a_privileged_prompt_scores_the_same_completions(make, folders):
    settings = make(
        teacher=configs.TeacherConfig(path=folders[0], context="{answer}={prompt}"),
        data__max_prompt_length=16,
    )
    training.train(settings)
    kl = [line["kl"] for line in read_metrics(settings.run_dir)]
    assert kl[0] > 1e-2  # the same weights, another prompt


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(make):
    settings = make(student__dtype="bfloat16", steps=2)
    result = training.train(settings)
    assert {a.dtype.name for a in read_weights(result.model).values()} == {"bfloat16"}
    assert all(np.isfinite(line["loss"]) for line in read_metrics(settings.run_dir))


def test_a_finished_run_without_checkpoints_is_not_started_over(make):
    training.train(make(steps=1))
    shutil.rmtree(Path(make().run_dir) / "checkpoints")
    with pytest.raises(ValueError, match="checkpoints are gone"):
        training.train(make(steps=1))


def test_completions_that_do_not_fit_the_model_are_refused(make):
    with pytest.raises(ValueError, match="max_new_tokens is 100, together more than the 64 positions"):
        training.train(make(max_new_tokens=100))


def test_teacher_and_student_of_different_tokenizers_are_refused_before_loading(make, folders, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"*"', '"x"'))
    (other / "model.safetensors").unlink()  # not needed to find out
    with pytest.raises(ValueError, match="vocabularies differ in 2 entries"):
        training.train(make(teacher__path=str(other)))


def test_rows_that_do_not_spread_over_the_mesh_are_refused(make, one_device):
    one_device.undo()
    with pytest.raises(ValueError, match="multiple of 8"):
        training.train(make(batch_size=12))


def test_prompts_that_do_not_fit_are_counted(make, capsys):
    training.train(make(data__max_prompt_length=9, steps=1))
    assert "of 64 training examples are longer than" in capsys.readouterr().out
    with pytest.raises(ValueError, match="max_prompt_length"):
        training.train(make("other", data__max_prompt_length=9, data__too_long="error"))


@pytest.mark.slow
def test_the_command_line_trains_stops_and_goes_on(make, tmp_path):
    """A real process, a real SIGINT."""
    settings = make(steps=400, logging__every=1)
    path = tmp_path / "config.yaml"
    path.write_text(configs.dump(dataclasses.replace(settings, mesh=configs.MeshConfig())))
    command = [sys.executable, "-m", "opd_jax.cli", "train", str(path)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = Path(settings.run_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "everything is saved" in err and f"opd-jax train {path}" in err
    saved = max(
        int(each.name) for each in (Path(settings.run_dir) / "checkpoints").iterdir() if each.name.isdigit()
    )
    out = subprocess.run(
        [*command, "--steps", "400"], env=env, capture_output=True, text=True, timeout=300, check=True
    ).stdout
    assert f"at step {saved}" in out and "sample from it: opd-jax generate --model" in out
    assert [line["step"] for line in read_metrics(settings.run_dir)] == list(range(1, 401))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--studnet.path", "x"], "student"),
        (["--student.path", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--data.source", "missing.jsonl"], "missing.jsonl"),
        (["--teacher.path", ""], "teacher.path is missing"),
        (["--rollout.temperature", "0.7"], "temperature"),
    ],
)
def test_bad_input_ends_in_one_clear_line(make, tmp_path, capsys, words, message):
    path = tmp_path / "config.yaml"
    path.write_text(configs.dump(make()))
    assert main(["train", str(path), *words]) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
