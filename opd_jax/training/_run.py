"""The run folder: what was asked for, with which software, and what came of it.

config.yaml       the resolved config          samples.jsonl   completions of each evaluation
versions.json     software, devices, git       checkpoints/    state to resume from
metrics.jsonl     one line per logged step     model/          the result, a Hugging Face folder
compile_cache/    compiled programs, so that a run that goes on compiles nothing; may be deleted
"""

import fcntl
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from opd_jax import config as _config
from opd_jax import parallel
from opd_jax._config_io import flatten, parse
from opd_jax.training._errors import TrainingError

_LOCK = ".lock"
COMPILE_CACHE = "compile_cache"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")

# A resumed run may change these: they leave the trained weights as they are, up to the rounding
# of another order of summation. `steps` may grow.
NEUTRAL = (
    "run_dir",
    "steps",
    "rollout_batch",
    "micro_batches",
    "loss_chunk",
    "max_bad_steps",
    "student.attention",
    "student.remat",
    "teacher.attention",
    "evaluation.every",
    "evaluation.batch_size",
    "evaluation.teacher",
    "checkpoint.",
    "mesh.",
    "teacher.mesh",
    "logging.",
)


class RunFolder:
    """A locked folder that holds one run; opening it again resumes the run.

    Of many processes the first writes; the others look whether they see what it has written.

    Args:
        path: the folder; made if it does not exist.
        config: the resolved config. If the folder holds a checkpoint, it must be the same run:
            everything that changes the result is equal.

    Attributes:
        path, checkpoints, model: the folder, and where checkpoints and the result belong.
        resumed: whether the folder holds a checkpoint to go on from.
        notices: what the user should know about resuming (other versions than before).

    Raises:
        ValueError: the folder holds something else, or a run with another config.
        TrainingError: another process is using it.
    """

    def __init__(self, path: str | Path, config: "_config.Config"):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.notices: list[str] = []
        self._files: dict[str, _Lines] = {}
        self._lock, self._writes = None, parallel.is_first()
        if not self._writes:
            self.resumed = _holds(self.checkpoints) or self.model.exists()
            return
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir {self.path} is a file; name a folder")
        self._refuse_foreign()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        try:
            self.resumed = _holds(self.checkpoints) or self.model.exists()
            if self.resumed:
                self._compare(config)
            else:
                self.truncate(-1)  # lines of a start that never came to its first checkpoint
            self._record(config)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files and lets go of the folder."""
        for lines in self._files.values():
            lines.close()
        self._files.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl; what is not finite becomes null."""
        if not self._writes:
            return
        values = {key: float(value) for key, value in metrics.items()}
        self._append("metrics.jsonl", {"step": int(step), "time": round(time.time(), 3), **values})

    def write_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Appends completions to samples.jsonl, one line each."""
        for sample in samples if self._writes else ():
            self._append("samples.jsonl", {"step": int(step), **sample})

    def truncate(self, step: int) -> None:
        """Drops what was written after `step`: call it with the step of the restored checkpoint."""
        for name in ("metrics.jsonl", "samples.jsonl") if self._writes else ():
            if name in self._files:
                self._files.pop(name).close()
            path = self.path / name
            if path.exists():
                kept = [line for line in read_jsonl(path) if line.get("step", 0) <= step]
                write_atomic(path, "".join(_json(line) for line in kept))

    @property
    def token(self) -> str:
        """Who holds the folder, in words of this start alone; empty if there is no such folder."""
        path = self.path / _LOCK
        return path.read_text() if path.exists() else ""

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if name not in self._files:
            self._files[name] = _Lines(self.path / name)
        self._files[name].append(_json(record))

    def _refuse_foreign(self) -> None:
        if not self.path.is_dir() or (self.path / "config.yaml").exists():
            return
        found = sorted(each.name for each in self.path.iterdir() if each.name not in (_LOCK, COMPILE_CACHE))
        if found:
            raise ValueError(
                f"run_dir {self.path} is not empty and holds no run (no config.yaml, but "
                f"{', '.join(found[:3])}{' ...' if len(found) > 3 else ''}); name another folder"
            )

    def _compare(self, config: "_config.Config") -> None:
        path = self.path / "config.yaml"
        # Both go through YAML, so that a tuple given in Python equals the list read back.
        old, new = _flat(_config.load(path)), _flat(config)
        differing = [
            f"{key}: {_show(old.get(key))} in the folder, {_show(new.get(key))} now"
            for key in dict.fromkeys((*old, *new))
            if old.get(key) != new.get(key) and not _neutral(key)
        ]
        if new["steps"] < old["steps"]:
            differing.append(f"steps: {old['steps']} in the folder, {new['steps']} now; steps may only grow")
        if differing:
            raise ValueError(
                f"{self.path} holds a run with another config; resume it with its own "
                f"({path}), or name another run_dir:\n" + "\n".join(f"  - {line}" for line in differing)
            )

    def _record(self, config: "_config.Config") -> None:
        write_atomic(self.path / "config.yaml", _config.dump(config))
        path, starts, now = self.path / "versions.json", [], environment()
        if self.resumed and path.exists():
            try:
                starts = json.loads(path.read_text())
            except ValueError:
                self.notices.append(f"{path} was not readable and is written anew")
        for name, version in (starts[-1]["versions"] if starts else {}).items():
            current = now["versions"].get(name)
            if current != version:
                self.notices.append(
                    f"{name} was {version} and is {current} now: results may differ in the last digits"
                )
        write_atomic(path, json.dumps([*starts, now], indent=2) + "\n")


def open_folder(config: "_config.Config") -> RunFolder:
    """The run folder of a config, opened by every process of a run.

    Raises:
        ValueError: also if the processes' configs or packages differ, or they do not share the folder.
    """
    parallel.same_everywhere(_flat(config) | _versions())
    folder = parallel.first_then_others(lambda: RunFolder(config.run_dir, config))
    try:
        token = parallel.of_first(folder.token)
        parallel.together(lambda: _see(folder, token))
    except BaseException:
        folder.close()
        raise
    return folder


def _flat(config: "_config.Config") -> dict[str, Any]:
    """Its values by dotted key, as YAML has them."""
    return flatten(parse(_config.dump(config), "the config")[0])


def _see(folder: RunFolder, token: str) -> None:
    if folder.token != token:
        raise ValueError(
            f"{socket.gethostname()} does not see what {token.partition(chr(10))[0]} has written to run_dir "
            f"{folder.path}: it must be on a file system that all hosts share"
        )


def environment() -> dict[str, Any]:
    """Versions, devices, command line and git state of this process."""
    import jax

    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "versions": _versions(),
        "platform": platform.platform(),
        "devices": dict(Counter(device.device_kind for device in jax.devices())),
        "processes": jax.process_count(),
        "git": git_state(Path(__file__).parent),
    }


def _versions() -> dict[str, str | None]:
    from opd_jax import __version__

    versions = {"python": platform.python_version(), "opd_jax": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the checkout that `folder` is in; None if in none."""
    if "site-packages" in folder.parts:  # an environment inside somebody's checkout
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ("git", "-C", str(folder), *words),
            check=True, capture_output=True, text=True, timeout=30,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.rstrip()  # fmt: skip

    try:
        status = git("status", "--porcelain")
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(status),
            "changes": status.splitlines(),
            "diff_stat": git("diff", "HEAD", "--stat").splitlines(),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; a last line that was cut off is left out.

    Raises:
        ValueError: a line other than the last is not JSON.
    """
    # Not splitlines(): completions may hold U+2028 and its like.
    *lines, rest = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate((*lines, *([rest] if rest else [])), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number <= len(lines):
                raise ValueError(f"{path}:{number}: not JSON: {line[:80]!r}") from error
    return records


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes a file so that a crash or a full disk leaves the old one or the new one."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _Lines:
    """A file that grows by whole lines: a failed write leaves no half line."""

    def __init__(self, path: Path):
        self._file = path.open("ab", buffering=0)

    def append(self, line: str) -> None:
        data, end = line.encode("utf-8", "replace"), self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) != len(data):
                raise OSError(f"{self._file.name}: only a part of a line could be written")
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()


def _lock(folder: Path) -> int:
    path = folder / _LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(handle, 200).decode(errors="replace").partition("\n")[0] or "another process"
        os.close(handle)
        raise TrainingError(f"{folder} is in use by {owner}; wait for it or name another run_dir") from None
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n{uuid.uuid4()}\n".encode())
    os.fsync(handle)  # a network file system shows other hosts what is flushed alone
    return handle


def _holds(checkpoints: Path) -> bool:
    """Whether there is a finished checkpoint: a folder named by its step and nothing else."""
    return checkpoints.is_dir() and any(each.name.isdigit() for each in checkpoints.iterdir())


def _neutral(key: str) -> bool:
    return any(key == each or key.startswith(f"{each.rstrip('.')}.") for each in NEUTRAL)


def _show(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _json(record: Mapping[str, Any]) -> str:
    """One line of JSON; numbers that are not finite, which JSON lacks, become null."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(plain, ensure_ascii=False, default=_scalar) + "\n"


def _scalar(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
