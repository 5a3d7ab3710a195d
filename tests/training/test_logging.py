"""Loggers and the terminal display."""

import io
import json
import re
import sys
import types
from dataclasses import replace

import pytest

from opd_jax.config import Config, LoggingConfig
from opd_jax.training import _logging
from opd_jax.training._logging import Display, Loggers
from opd_jax.training._run import RunFolder, read_jsonl


@pytest.fixture
def run(tmp_path):
    with RunFolder(tmp_path / "run", Config()) as run:
        yield run


def test_metrics_go_to_the_run_folder(run):
    loggers = Loggers(run, Config())
    loggers.write(1, {"loss": 0.5})
    loggers.close()
    loggers.close()
    (line,) = read_jsonl(run.path / "metrics.jsonl")
    assert line["step"] == 1 and line["loss"] == 0.5


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    with RunFolder(tmp_path, Config()) as run:
        loggers = Loggers(run, Config())
        for step in (1, 2, 3):
            loggers.write(step, {"loss": 0.5})
        (run.checkpoints / "2").mkdir(parents=True)
    with RunFolder(tmp_path, Config()) as run:
        Loggers(run, Config(), start=2)
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_tensorboard(run, capsys):
    pytest.importorskip("tensorboardX")
    config = Config(logging=LoggingConfig(tensorboard=True))
    loggers = Loggers(run, config)
    loggers.write(1, {"loss": 0.5, "bad": float("nan")})
    loggers.close()
    (events,) = (run.path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes() and b"bad" not in events.read_bytes()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("logging", "module", "extra"),
    [
        (LoggingConfig(tensorboard=True), "tensorboardX", "tensorboard"),
        (LoggingConfig(wandb="project"), "wandb", "wandb"),
    ],
)
def test_a_missing_logger_is_named_before_anything_is_opened(run, monkeypatch, logging, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}.*pip install 'opd_jax\[{extra}\]'"):
        Loggers(run, Config(logging=logging))
    assert not (run.path / "tensorboard").exists() and not (run.path / "wandb_id").exists()


def test_wandb_resumes_its_own_page(tmp_path, monkeypatch):
    calls = []

    class Page:
        def log(self, metrics, step):
            calls.append((metrics, step))

        def finish(self):
            calls.append("finish")

    def init(**arguments):
        calls.append(arguments)
        return Page()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = replace(Config(), logging=LoggingConfig(wandb="project"))
    for start in (0, 1):
        with RunFolder(tmp_path / "run", config) as run:
            loggers = Loggers(run, config, start=start)
            loggers.write(start + 1, {"loss": 0.5})
            loggers.close()
            (run.checkpoints / "1").mkdir(parents=True, exist_ok=True)
    first, one, _, second, two, last = calls
    assert first["project"] == "project" and first["name"] == "run"
    assert first["resume"] == "allow" and first["id"] == second["id"]
    assert json.dumps(first["config"]) and first["config"]["steps"] == 100
    assert one == ({"loss": 0.5}, 1) and two == ({"loss": 0.5}, 2) and last == "finish"


# ---- the display


class Time:
    """A clock that the test winds."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(_logging, "time", clock)
    return clock


METRICS = {"loss": 0.25, "kl": 0.125, "tokens_per_second": 1234.4, "gradient_norm": 1.0}


def test_plain_lines_without_a_terminal(clock):
    out = io.StringIO()
    with Display(100, file=out) as display:
        display.status("loading the student")
        clock.now += 2.5
        display.status("compiling")
        clock.now += 0.5
        display.keep({"accuracy": 0.5})
        for step in range(1, 101):
            display.step(step, METRICS)
            clock.now += 1
            if step == 50:
                clock.now += 1000  # a pause does not spoil the time left
    lines = out.getvalue().splitlines()
    assert lines[:3] == ["loading the student ...", "loading the student: 2.5 s", "compiling ..."]
    shown = "loss 0.2500  KL 0.1250  accuracy 0.500  tokens/s 1234"
    assert lines[3] == f"step 1/100  {shown}"
    assert f"step 51/100  {shown}  0:49 left" in lines
    assert lines[-1] == f"step 100/100  {shown}  0:00 left"
    assert 20 < len(lines) < 30


def test_a_task_without_a_terminal(clock):
    out = io.StringIO()
    with Display(1, file=out) as display:
        report = display.task("evaluating", 10)
        for done in (2, 4, 6, 8, 10):
            clock.now += 2
            report(done)
        report(11)  # more than announced: nothing happens
        report = display.task("sampling")
        clock.now += 6
        report(3)
        report(3, 9)
        clock.now += 6
        report(4, 9)
        late = display.task("rendering", 2)
        display.step(1, {})
        late(2)  # another phase has begun: nothing happens
    assert out.getvalue().splitlines() == [
        "evaluating ...",
        "  evaluating: 6/10",
        "evaluating: 10.0 s",
        "sampling ...",
        "  sampling: 3",
        "  sampling: 4/9",
        "sampling: 12.0 s",
        "rendering ...",
        "step 1/1",
    ]


def test_a_phase_that_fails_is_not_reported_as_done(clock):
    out = io.StringIO()
    with pytest.raises(OSError), Display(1, file=out) as display:
        display.status("loading")
        clock.now += 9
        raise OSError
    assert out.getvalue() == "loading ...\n"


def test_text_is_printed_as_it_is():
    out = io.StringIO()
    with Display(1, file=out) as display:
        display.print("[red]x[/red]")
        display.sample("1+1=", "[b]2\n" + "y" * 1000, 1.0)
        display.sample("1+1=", "3")
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["[red]x[/red]", "  prompt: 1+1="]
    assert lines[2].startswith("  sample: [b]2\\ny") and lines[2].endswith("yy  (reward 1)")
    assert len(lines[2]) < 450 and lines[4] == "  sample: 3"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_live_bar(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    with Display(3, file=out) as display:
        display.status("loading [bold]")
        report = display.task("evaluating", 4)
        report(2, 4)
        report(4)
        for step in (1, 2, 3):
            display.step(step, METRICS)
        display.sample("a", "[red]b", 0.0)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "loading [bold]" in text and "evaluating" in text
    assert "3/3" in text and "KL 0.1250" in text and "0:00 left" in text
    assert "sample: [red]b  (reward 0)" in text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3723, "1:02:03")])
def test_durations(seconds, text):
    assert _logging._duration(seconds) == text
