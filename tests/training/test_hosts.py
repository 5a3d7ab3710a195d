"""Several processes on loopback, each with some of the devices, against one process with all of them."""

import dataclasses
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from opd_jax import config as configs
from opd_jax import parallel
from opd_jax.parallel import _hosts
from opd_jax.training import _setup, train
from tests.training.runs import make_folder, read_metrics, read_weights

_HEARTBEAT = 10


def verify_and_tell(text: str, _answer) -> float:
    """A verifier that writes down which process has seen what."""
    with open(os.environ["SEEN"], "a") as file:
        file.write(f"{os.getpid()} {text}\n")
    return float(len(text) % 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return make_folder(folder / "student", 0), make_folder(folder / "teacher", 1, width=24)


@pytest.fixture
def make(folders, tmp_path):
    """Writes a small config; keyword arguments are its keys."""

    def write(name: str, **changes) -> Path:
        settings = configs.Config(
            steps=2,
            batch_size=8,
            max_new_tokens=8,
            run_dir=str(tmp_path / name),
            student=configs.StudentConfig(path=folders[0]),
            teacher=configs.TeacherConfig(path=folders[1]),
            data=configs.DataConfig(source="arithmetic", options=dict(seed=1, size=64), max_prompt_length=16),
            # A large eps: else Adam turns rounding errors of vanishing gradients into whole steps.
            optimizer=configs.OptimizerConfig(learning_rate=1e-2, eps=1e-3),
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(configs.dump(dataclasses.replace(settings, **changes)))
        return path

    return write


def _start(config: Path, count: int, devices: int, *words: str, only: int | None = None, seeds: tuple = ()):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": os.environ["OPD_JAX_TEST_CACHE"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PYTHONFAULTHANDLER": "1",
    }
    hosts = (
        f"--coordinator_address {address} --num_processes {count} --heartbeat_timeout_seconds {_HEARTBEAT}"
    )
    command = [sys.executable, "-m", "opd_jax.cli", "train", str(config), *words, *hosts.split()]
    processes = []
    for i in range(count) if only is None else [only]:
        own = ["--process_id", str(i), *(["--seed", str(seeds[i])] if seeds else [])]
        said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody empties would hold it up)
        started = subprocess.Popen([*command, *own], env=environment, stdout=said, stderr=subprocess.STDOUT)
        processes.append((started, said))
    return processes


def _end(processes: list) -> list[tuple[int, str]]:
    """(exit status, output) of each."""
    try:
        ended = []
        for process, said in processes:
            status = process.wait(timeout=300)
            said.seek(0)
            ended.append((status, said.read()))
        return ended
    finally:
        for process, said in processes:
            process.kill()
            said.close()


def _succeed(processes: list) -> list[str]:
    ended = _end(processes)
    assert [status for status, _ in ended] == [0] * len(ended), "\n----\n".join(out for _, out in ended)
    return [out for _, out in ended]


def _assert_equal_runs(one: Path, many: Path) -> None:
    for name, weights in read_weights(one / "model").items():
        np.testing.assert_allclose(read_weights(many / "model")[name], weights, atol=1e-5, rtol=0)
    lines = read_metrics(str(one)), read_metrics(str(many))
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        assert (a.get("tokens"), a.get("reward")) == (b.get("tokens"), b.get("reward"))
        for key in a.keys() & {"loss", "kl", "extrapolate_score"}:
            assert b[key] == pytest.approx(a[key], abs=1e-5), key


@pytest.mark.slow
def test_two_then_four_processes_are_one(make, tmp_path, monkeypatch, quick_compilation):
    """A step and a search on two processes with two devices each, and a second step on four processes from
    the state of the first, with rows that lie on two processes each: as two steps of one process."""
    changes = dict(
        samples_per_prompt=4,
        task_weight=0.5,
        data=configs.DataConfig(
            source="arithmetic",
            options=dict(seed=1, size=64),
            max_prompt_length=16,
            verifier="tests.training.test_hosts:verify_and_tell",
        ),
        foresight=configs.ForesightConfig(
            track=configs.TrackConfig(rank=2, every=1),
            extrapolate=configs.ExtrapolateConfig(schedule="steps", steps=(1,), prompts=6, factors=(0.5,)),
        ),
        checkpoint=configs.CheckpointConfig(every=1),
    )
    one, many = make("one", **changes), make("many", **changes)
    make_mesh = _setup.make_mesh
    monkeypatch.setattr(_setup, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:4]))
    monkeypatch.setenv("SEEN", str(tmp_path / "one.txt"))
    train(configs.load(one))
    monkeypatch.setenv("SEEN", str(tmp_path / "many.txt"))
    first, second = _succeed(_start(many, 2, 2, "--steps", "1"))
    assert "step 1/1" in first and "step 1/1" not in second  # one speaks
    resumed = _succeed(_start(many, 4, 1, "--mesh.fsdp", "2", "--mesh.tensor", "2"))
    assert "at step 1" in resumed[0]
    _assert_equal_runs(one.with_suffix(""), many.with_suffix(""))

    seen = [(tmp_path / f"{name}.txt").read_text().splitlines() for name in ("one", "many")]
    texts = [sorted(line.partition(" ")[2] for line in lines) for lines in seen]
    assert texts[0] == texts[1]  # nothing twice
    owners = [line.partition(" ")[0] for line in seen[1]]
    assert sorted(map(owners.count, set(owners))) == [2, 2, 2, 2, 4, 4]


@pytest.mark.slow
def test_what_differs_and_what_is_missing_ends_all_with_its_name(make):
    config = make("run")
    for status, out in _end(_start(config, 2, 1, seeds=(1, 2))):
        assert status == 1 and "seed is 1 on process 0, 2 on process 1" in out, out
    [(status, out)] = _end(_start(config, 2, 1, "--initialization_timeout", "3", only=0))
    assert status and re.search(r"timed out task names:\s+1\b", out), out


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_one_that_is_asked_to_stop_stops_all(make):
    config = make("run", steps=10_000, checkpoint=configs.CheckpointConfig(every=1))
    metrics = config.with_suffix("") / "metrics.jsonl"

    def wait_for(lines: int) -> None:
        end = time.monotonic() + 240
        while not metrics.exists() or len(metrics.read_text().splitlines()) < lines:
            if time.monotonic() > end:  # tell where they are, and leave none behind
                for process, _ in processes:
                    process.send_signal(signal.SIGABRT)
                pytest.fail("\n----\n".join(out for _, out in _end(processes)))
            time.sleep(0.1)

    processes = _start(config, 2, 1)
    wait_for(2)
    processes[1][0].send_signal(signal.SIGTERM)
    for status, out in _end(processes):
        assert status == 130 and "everything is saved" in out, out
    done = len(metrics.read_text().splitlines())

    # What one process alone has written and reads is damaged: all go back to the checkpoint before.
    checkpoints = config.with_suffix("") / "checkpoints"
    for part in (checkpoints / str(done) / "state" / "ocdbt.process_1" / "d").iterdir():
        os.truncate(part, 10)
    processes = _start(config, 2, 1)
    wait_for(done + 2)
    processes[1][0].kill()
    start = time.monotonic()
    (status, out), _ = _end(processes)
    assert status and time.monotonic() - start < 3 * _HEARTBEAT
    assert f"at step {done - 1}" in out and (checkpoints / f"damaged-{done}").exists(), out
    assert re.search(r"unhealthy[^\n]*:\s+1\b", out), out


def test_a_coordinator_that_cannot_be_reached():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=f"{address} cannot be reached .*tried for 0 s: does process 0"):
        parallel.start(address, 2, 1, initialization_timeout=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(coordinator_address="host:1"), "num_processes and process_id must be given, too"),
        (dict(coordinator_address="host", num_processes=2, process_id=0), "it must be HOST:PORT"),
        (
            dict(coordinator_address="host:1", num_processes=2, process_id=2),
            "process_id is 2 of num_processes 2",
        ),
    ],
)
def test_arguments_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        parallel.start(**given)


def test_no_cluster_to_be_found(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM", "TPU_", "KUBERNETES", "OMPI")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    code = "from opd_jax import parallel; parallel.start()"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode and "say --coordinator_address HOST:PORT" in out.stderr


def test_differences_name_key_values_and_processes():
    found = _hosts._differences([dict(a=1, b="x"), dict(a=1, b="y"), dict(a=2)])
    assert found == [
        "a is 1 on process 0, 2 on process 2",
        "b is 'x' on process 0, 'y' on process 1",
        "b is 'x' on process 0, None on process 2",
    ]


def test_alone_everything_is_what_it_says():
    assert parallel.together(lambda: 3) == parallel.first_then_others(lambda: 3) == 3
    assert parallel.shared(lambda i: i / 2, 3).tolist() == [0, 0.5, 1]
    assert parallel.anybody(True) and not parallel.anybody(False)
    assert parallel.of_first([1]) == [1] and parallel.is_first() and not parallel.several()
    with pytest.raises(KeyError) as caught:
        parallel.together(lambda: {}["x"])
    assert not hasattr(caught.value, "everywhere")


def test_an_error_that_all_know_of_waits_for_nobody(monkeypatch):
    """Though its text is XLA's, as of a process whose devices are full: nobody has died."""
    done = []
    monkeypatch.setattr(_hosts, "several", lambda: True)
    monkeypatch.setattr(_hosts.time, "sleep", lambda seconds: done.append(seconds))
    monkeypatch.setattr(_hosts.jax.distributed, "shutdown", lambda: done.append("shutdown"))
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    error.everywhere = True
    parallel.leave(error)
    assert done == ["shutdown"]
