"""The run folder: what it holds, what it refuses, and that nothing is lost."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import opd_jax
from opd_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    StudentConfig,
    TeacherConfig,
    load,
)
from opd_jax.training import _run
from opd_jax.training._run import RunFolder, git_state, read_jsonl, write_atomic

CONFIG = Config(
    run_dir="somewhere",
    student=StudentConfig(path="small"),
    teacher=TeacherConfig(path="large"),
    data=DataConfig(source="arithmetic", options={"seed": 0, "kinds": ("add",)}),
)


@pytest.fixture
def started(tmp_path):
    """A run that was stopped after its first checkpoint."""
    with RunFolder(tmp_path / "run", CONFIG) as run:
        assert not run.resumed
        run.write_metrics(0, {"accuracy": 0.5})
        run.write_metrics(1, {"loss": 1.0})
        run.write_metrics(2, {"loss": 0.5})
        run.write_samples(0, [{"completion": "a"}])
        run.write_samples(2, [{"completion": "b"}, {"completion": "c"}])
        (run.checkpoints / "1").mkdir(parents=True)
    return tmp_path / "run"


def refusal(path: Path, config: Config) -> str:
    with pytest.raises(ValueError) as error:
        RunFolder(path, config)
    return str(error.value)


def test_a_new_folder_records_what_runs(tmp_path):
    path = tmp_path / "deep" / "run"
    with RunFolder(path, CONFIG) as run:
        assert run.model == path / "model" and not run.notices
    expected = replace(CONFIG, data=replace(CONFIG.data, options={"seed": 0, "kinds": ["add"]}))
    assert load(path / "config.yaml") == expected
    (start,) = json.loads((path / "versions.json").read_text())
    assert start["versions"]["jax"] == jax.__version__
    assert start["versions"]["opd_jax"] == opd_jax.__version__
    assert start["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(_run._PACKAGES) < set(start["versions"])
    assert start["argv"] == sys.argv and sum(start["devices"].values()) == jax.device_count()


def test_lines_are_on_disk_at_once(tmp_path):
    with RunFolder(tmp_path / "run", CONFIG) as run:
        values = {"a": np.float32(0.5), "b": jax.numpy.float32(2), "c": float("nan"), "d": 3}
        run.write_metrics(1, values)
        (line,) = read_jsonl(run.path / "metrics.jsonl")
        assert line.pop("time") > 1e9
        assert line == {"step": 1, "a": 0.5, "b": 2.0, "c": None, "d": 3.0}
        samples = [
            {"completion": 'ü\u2028"\n\ud800', "reward": np.float32(1), "seed": np.int64(3)},
            {"completion": "", "reward": float("inf"), "metadata": {"x": [1]}},
        ]
        run.write_samples(1, samples)
        first, second = read_jsonl(run.path / "samples.jsonl")
    assert first == {"step": 1, "completion": 'ü\u2028"\n?', "reward": 1.0, "seed": 3}
    assert second == {"step": 1, "completion": "", "reward": None, "metadata": {"x": [1]}}


def test_resuming_goes_on_where_the_checkpoint_was(started):
    with RunFolder(started, CONFIG) as run:
        assert run.resumed and not run.notices
        run.truncate(1)
        run.write_metrics(2, {"loss": 0.25})
        run.write_samples(2, [{"completion": "d"}])
        run.truncate(2)  # with the files open
        run.write_metrics(3, {"loss": 0.125})
    lines = read_jsonl(started / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line.get("loss") for line in lines] == [None, 1.0, 0.25, 0.125]
    assert [line["completion"] for line in read_jsonl(started / "samples.jsonl")] == ["a", "d"]
    assert len(json.loads((started / "versions.json").read_text())) == 2


def test_a_line_that_was_cut_off_is_dropped(started):
    path = started / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 3, "lo')
    with RunFolder(started, CONFIG) as run:
        run.truncate(2)
        run.write_metrics(3, {"loss": 1.0})
    assert [line["step"] for line in read_jsonl(path)] == [0, 1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(started):
    path = started / "metrics.jsonl"
    path.write_text("oops\n" + path.read_text())
    with RunFolder(started, CONFIG) as run, pytest.raises(ValueError, match=r"metrics.jsonl:1: not J"):
        run.truncate(2)


NEUTRAL = [
    {"steps": 200},
    {"run_dir": "elsewhere"},
    {"micro_batches": 4, "rollout_batch": 8, "loss_chunk": 64, "max_bad_steps": 9},
    {"mesh": MeshConfig(data=2), "logging": LoggingConfig(every=7, tensorboard=True)},
    {"checkpoint": CheckpointConfig(every=1, keep=9)},
    {"evaluation": EvaluationConfig(every=5, batch_size=8)},
    {"student": StudentConfig(path="small", remat="block", attention="xla")},
]


@pytest.mark.parametrize("changes", NEUTRAL)
def test_a_resumed_run_may_change_what_leaves_the_result_alone(started, changes):
    with RunFolder(started, replace(CONFIG, **changes)) as run:
        assert run.resumed
    config = load(started / "config.yaml")
    assert all(getattr(config, key) == value for key, value in changes.items())


def test_a_run_with_another_config_is_refused(started):
    before = (started / "config.yaml").read_text()
    message = refusal(
        started,
        replace(
            CONFIG,
            steps=50,
            seed=3,
            optimizer=OptimizerConfig(learning_rate=1e-3),
            data=replace(CONFIG.data, options={"kinds": ["add"]}),
            evaluation=EvaluationConfig(prompts=3),
        ),
    )
    assert str(started / "config.yaml") in message
    for line in (
        "seed: 0 in the folder, 3 now",
        "optimizer.learning_rate: 1e-06 in the folder, 0.001 now",
        "data.options.seed: 0 in the folder, nothing now",
        "evaluation.prompts: 0 in the folder, 3 now",
        "steps: 100 in the folder, 50 now; steps may only grow",
    ):
        assert f"  - {line}" in message.splitlines()
    assert message.count("\n") == 5
    assert (started / "config.yaml").read_text() == before
    with RunFolder(started, CONFIG) as run:  # the refusal let go of the lock
        assert run.resumed


def test_every_neutral_key_exists():
    keys = set(_run.flatten(_run.parse(_run._config.dump(CONFIG), "")[0]))
    for key in _run.NEUTRAL:
        assert key in keys or any(each.startswith(key) for each in keys if key.endswith("."))


def test_a_start_without_a_checkpoint_is_begun_anew(tmp_path):
    path = tmp_path / "run"
    with RunFolder(path, CONFIG) as run:
        run.write_metrics(0, {"accuracy": 0.5})
        (run.checkpoints / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    with RunFolder(path, replace(CONFIG, seed=3)) as run:
        assert not run.resumed
    assert load(path / "config.yaml").seed == 3
    assert read_jsonl(path / "metrics.jsonl") == []
    assert len(json.loads((path / "versions.json").read_text())) == 1


def test_other_versions_than_before_are_noticed(started):
    path = started / "versions.json"
    starts = json.loads(path.read_text())
    starts[-1]["versions"] |= {"jax": "0.1", "gone": "3"}
    path.write_text(json.dumps(starts))
    with RunFolder(started, CONFIG) as run:
        assert f"jax was 0.1 and is {jax.__version__} now" in run.notices[0]
        assert "gone was 3 and is None now" in run.notices[1]
    path.write_text("[")
    with RunFolder(started, CONFIG) as run:
        assert "not readable" in run.notices[0]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    message = refusal(tmp_path, CONFIG)
    assert "is not empty and holds no run (no config.yaml, but thesis.tex)" in message
    assert os.listdir(tmp_path) == ["thesis.tex"]
    assert "is a file; name a folder" in refusal(tmp_path / "thesis.tex", CONFIG)


def test_two_processes_cannot_share_a_folder(tmp_path):
    path = tmp_path / "run"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from opd_jax.training import _run\n"
            "folder = Path(sys.argv[1]); folder.mkdir(); handle = _run._lock(folder)\n"
            "print('held', flush=True); sys.stdin.read()",
            str(path),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(opd_jax.__file__).parents[1],
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=rf"in use by process {holder.pid} on "):
            RunFolder(path, CONFIG)
        assert os.listdir(path) == [".lock"]
    finally:
        holder.kill()
        holder.communicate()
    with RunFolder(path, CONFIG), pytest.raises(RuntimeError, match=f"process {os.getpid()} on"):
        RunFolder(path, CONFIG)


FULL = Path("/dev/full")  # every write to it fails with "no space left on device"


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    lines = _run._Lines(tmp_path / "x")
    lines.append("one\n")
    real = lines._file

    class Partial:
        """Takes half a line, then the disk is full."""

        name, seek, truncate = real.name, real.seek, real.truncate

        def write(self, data):
            return real.write(data[: len(data) // 2])

    lines._file = Partial()
    with pytest.raises(OSError, match="only a part of a line"):
        lines.append("two\n")
    lines._file = real
    lines.append("three\n")
    lines.close()
    assert (tmp_path / "x").read_text() == "one\nthree\n"


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_atomic(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.yaml"]


def test_git_state(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "init.defaultBranch=main")
        subprocess.run(("git", *identity, *words), cwd=tmp_path, check=True, capture_output=True)

    assert git_state(tmp_path) is None  # no checkout
    git("init")
    assert git_state(tmp_path) is None  # no commit
    (tmp_path / "a").write_text("1\n")
    git("add", "a")
    git("commit", "-m", "first")
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40 and not state["dirty"] and state["diff_stat"] == []
    (tmp_path / "a").write_text("2\n")
    (tmp_path / "b").write_text("2\n")
    state = git_state(tmp_path)
    assert state["dirty"] and state["changes"] == [" M a", "?? b"]
    assert "1 file changed" in state["diff_stat"][-1]
    assert git_state(tmp_path / "site-packages" / "opd_jax") is None
