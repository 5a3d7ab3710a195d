"""All of the analysis of some runs from one base."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd_jax.analysis._cache import Cache, default_folder, opened
from opd_jax.analysis._checkpoints import Checkpoint, open_checkpoint
from opd_jax.analysis._compare import compare
from opd_jax.analysis._geometry import Geometry, geometry
from opd_jax.analysis._names import step_of
from opd_jax.analysis._pool import Progress
from opd_jax.analysis._result import Result, Run
from opd_jax.analysis._trajectory import check_steps, trajectory

_DEFAULT = object()


def analyze(
    base: Any,
    runs: Mapping[str, Sequence[Any]],
    *,
    steps: Mapping[str, Sequence[int]] | None = None,
    scores: Mapping[str, Mapping[int, float]] | None = None,
    k: int = 20,
    cache: Cache | str | Path | None = _DEFAULT,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Geometry of every checkpoint, trajectories of runs with several, and comparisons of several runs.

    Args:
        base: whatever `open_checkpoint` takes.
        runs: by name, checkpoints: whatever `open_checkpoint` takes, or a folder of checkpoint folders; a run
            folder stands for all of its checkpoints.
        steps: of a run's checkpoints, in the order given; else as their paths tell.
        scores: by run and step; a run folder's own accuracies are found in it.
        k: leading directions that trajectories follow.
        cache: folder for results; None: no cache; by default opd_jax/analysis in the user's cache folder.
        workers: see `geometry`.
        progress: see `geometry`.

    Raises:
        ValueError: if a run has no checkpoints, two of the same step, or several without steps.

    Example:
        >>> import numpy as np
        >>> from opd_jax import analysis
        >>> tree = lambda x: {"layers": {"0": {"up": np.diag([x, 1.0, 1.0])}}}
        >>> result = analysis.analyze(tree(0), {"a": [tree(1), tree(3)]}, steps={"a": [10, 20]}, cache=None)
        >>> [(row["step"], row["norm"]) for row in result.tables()["trajectories"]]
        [(10, 1.0), (20, 3.0)]
    """
    if not runs:
        raise ValueError("no runs are given")
    steps, scores = steps or {}, scores or {}
    if unknown := (set(steps) | set(scores)) - set(runs):
        raise ValueError(f"steps or scores are given of {', '.join(sorted(unknown))}, which is no run here")
    base = open_checkpoint(base)
    opened_runs = {n: _open(n, base, sources, steps.get(n)) for n, sources in runs.items()}
    with opened(default_folder() if cache is _DEFAULT else cache) as store:
        how = dict(cache=store, workers=workers, progress=progress)
        found = [_run(name, base, opened_runs[name], runs[name], scores.get(name), k, how) for name in runs]
    all_scores = {run.name: run.scores for run in found}
    tables = compare({r.name: r.checkpoints for r in found}, scores=all_scores) if len(found) > 1 else {}
    return Result(base.label, tuple(found), tables, tuple(note for run in found for note in _notes(run)))


def _run(name, base, checkpoints: list[Checkpoint], sources, scores, k, how) -> Run:
    way = None
    if len(checkpoints) > 1:  # first: it leaves the spectra in the cache
        way = trajectory(base, [(each.step, each) for each in checkpoints], k=k, **how)
    found = geometry(base, checkpoints, **how)
    info, own = _run_folder(sources[-1])
    kept = {step: score for step, score in own.items() if step in {each.step for each in checkpoints}}
    return Run(name, tuple(found), way, dict(scores) if scores else kept, info)


def _open(name: str, base: Checkpoint, sources: Sequence[Any], steps) -> list[Checkpoint]:
    """The checkpoints of a run in the order of their steps."""
    sources = [each for source in sources for each in expand(source)]
    if not sources:
        raise ValueError(f"run {name} has no checkpoints")
    if steps is not None and len(steps) != len(sources):
        raise ValueError(f"run {name} has {len(sources)} checkpoints, but {len(steps)} steps are given")
    found = []
    for i, source in enumerate(sources):
        given = steps[i] if steps is not None else None
        checkpoint = open_checkpoint(source, base=base, step=given)
        if checkpoint.step is None and isinstance(source, str | Path):
            checkpoint.step = _run_folder(source)[0].get("steps")
        found.append(checkpoint)
    if len(found) > 1:
        try:
            check_steps([(each.step, each.label) for each in found])
        except ValueError as error:
            raise ValueError(f"run {name}: {error}") from None
        found.sort(key=lambda each: each.step)
    return found


def expand(source: Any) -> list[Any]:
    """A run folder as its checkpoints and its final model, a folder of checkpoint folders (`checkpoint-100`,
    `step_200`, ...) as these, by step; anything else as it is."""
    if not isinstance(source, str | Path):
        return [source]
    folder = Path(source).expanduser()
    files = ("config.json", "adapter_config.json", "_CHECKPOINT_METADATA")
    if not folder.is_dir() or any((folder / name).exists() for name in files):
        return [source]
    if any(folder.glob("*.safetensors")):
        return [source]
    final = []
    if (folder / "config.yaml").exists():
        if (folder / "model" / "config.json").exists():
            final = [source]  # which is opened as its model
        folder = folder / "checkpoints"
    inside = [p for p in folder.glob("*") if p.is_dir() and step_of(p.name) is not None]
    inside = [p for p in inside if not p.name.startswith("damaged") and "tmp" not in p.name]
    last = _run_folder(source)[0].get("steps") if final else None
    inside = sorted((p for p in inside if step_of(p.name) != last), key=lambda p: step_of(p.name))
    return [*inside, *final] or [source]


def _run_folder(source: Any) -> tuple[dict[str, Any], dict[int, float]]:
    """What the run folder around a checkpoint tells: of its configuration, and accuracies by step."""
    if not isinstance(source, str | Path):
        return {}, {}
    path = Path(source).expanduser()
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.yaml").exists() and (folder / "metrics.jsonl").exists():
            return _configuration(folder), _accuracies(folder / "metrics.jsonl")
    return {}, {}


def _configuration(folder: Path) -> dict[str, Any]:
    from opd_jax._extras import require

    yaml = require("yaml")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        found = {key: config.get(key) for key in ("objective", "loss", "steps", "batch_size")}
        found["learning_rate"] = (config.get("optimizer") or {}).get("learning_rate")
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
        return {}  # some other program's config.yaml
    return {key: value for key, value in found.items() if isinstance(value, str | int | float)}


def _accuracies(path: Path) -> dict[int, float]:
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            found[int(entry["step"])] = float(entry["accuracy"])
        except (ValueError, KeyError, TypeError):
            continue  # a step without evaluation, or a line cut off
    return found


def _notes(run: Run) -> list[str]:
    notes = [f"{run.name}, {_where(g)}: {g.summary()}" for g in run.checkpoints if g.unchanged or g.skipped]
    if run.trajectory is None:
        notes.append(
            f"{run.name} has one checkpoint: its geometry is shown; a trajectory needs at least two, at "
            "different steps"
        )
    return notes


def _where(g: Geometry) -> str:
    return "final" if g.step is None else f"step {g.step}"


def with_interventions(result: Result, folder: str | Path) -> Result:
    """The result with what `opd-jax intervene` wrote into a folder's tables/, if it did.

    Raises:
        ValueError: naming a table that is none of intervene's.
    """
    found = {}
    for path in sorted((Path(folder).expanduser() / "tables").glob("intervention_*.json")):
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            whole = all({"experiment", "setting", "score", "error"} <= row.keys() for row in rows)
        except (ValueError, AttributeError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"{path} is not a table of opd-jax intervene; remove it or run that again")
        found[path.stem.removeprefix("intervention_")] = rows
    return replace(result, interventions=found)


def with_scores(result: Result, scores: Mapping[str, Sequence[float]]) -> Result:
    """The same result with scores of its runs, one a checkpoint in the order of steps.

    Raises:
        ValueError: if their number is not that of the checkpoints.
    """
    runs = []
    for run in result.runs:
        if run.name in scores:
            given = scores[run.name]
            if len(given) != len(run.checkpoints):
                raise ValueError(
                    f"run {run.name} has {len(run.checkpoints)} checkpoints, but {len(given)} scores"
                )
            kept = {g.step: score for g, score in zip(run.checkpoints, given, strict=True)}
            run = replace(run, scores=kept)
        runs.append(run)
    every = {run.name: run.checkpoints for run in runs}
    tables = compare(every, scores={r.name: r.scores for r in runs}) if len(runs) > 1 else {}
    return replace(result, runs=tuple(runs), comparison=tables)
