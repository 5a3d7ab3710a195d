"""Everything of one `opd-jax analyze`: as JSON, and as tables."""

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from opd_jax.analysis._compare import Table
from opd_jax.analysis._geometry import FRACTIONS, MEASURES, Geometry, MatrixGeometry
from opd_jax.analysis._trajectory import MatrixTrajectory, Trajectory

FORMAT = 1
KEPT = 32
"""Leading singular values of each matrix that are written, unless all are asked for."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: as given.
        checkpoints: geometries, in the order of their steps.
        trajectory: None if it has fewer than two checkpoints.
        scores: by step; empty if none are known.
        info: of its configuration: "learning_rate", "batch_size", ..., where it could be found.
    """

    name: str
    checkpoints: tuple[Geometry, ...]
    trajectory: Trajectory | None = None
    scores: Mapping[int, float] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What the report is made of.

    Attributes:
        base: label of the base.
        runs: in the order given.
        comparison: tables of `compare`; empty for a single run.
        notes: what a reader should know: what was skipped, what is equal, what could not be computed.
        interventions: tables of `intervene`, by experiment; empty if there are none.

    Example:
        >>> import numpy as np
        >>> from opd_jax import analysis
        >>> found = analysis.geometry({"up": np.eye(2)}, {"up": 2 * np.eye(2)})
        >>> result = Result("base", (Run("one", (found,)),))
        >>> Result.from_json(result.to_json()) == result
        True
    """

    base: str
    runs: tuple[Run, ...]
    comparison: Mapping[str, Table] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    interventions: Mapping[str, Table] = field(default_factory=dict)

    def to_json(self, *, full: bool = False) -> str:
        """Plain JSON; NaN becomes null. `full` keeps all singular values, not only the leading ones."""
        content = {"format": FORMAT, "fractions": FRACTIONS, "base": self.base, "notes": self.notes}
        content |= {"comparison": dict(self.comparison), "interventions": dict(self.interventions)}
        content["runs"] = [
            {
                "name": run.name,
                "info": dict(run.info),
                "scores": [[step, score] for step, score in run.scores.items()],
                "checkpoints": [_geometry_out(g, full) for g in run.checkpoints],
                "trajectory": None if run.trajectory is None else _trajectory_out(run.trajectory),
            }
            for run in self.runs
        ]
        return json.dumps(_plain(content), allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """The inverse of `to_json`.

        Raises:
            ValueError: if the text is something else, or of another format.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"not a result of opd-jax analyze of format {FORMAT}")
        runs = tuple(
            Run(
                run["name"],
                tuple(_geometry_in(g) for g in run["checkpoints"]),
                None if run["trajectory"] is None else _trajectory_in(run["trajectory"]),
                {step: score for step, score in run["scores"]},
                run["info"],
            )
            for run in content["runs"]
        )
        interventions = content.get("interventions", {})
        return cls(content["base"], runs, content["comparison"], tuple(content["notes"]), interventions)

    def tables(self) -> dict[str, Table]:
        """By name: "summary" (means, as the paper's Table 1), "matrices", "modules", "layers",
        "trajectories", "alignment", "skipped", those of `compare` as "compare_..." and those of `intervene`
        as "intervention_..."."""
        found: dict[str, Table] = {
            name: [] for name in ("summary", "matrices", "modules", "layers", "trajectories", "alignment")
        }
        found["skipped"] = []
        for run in self.runs:
            for g in run.checkpoints:
                at = {"run": run.name, "step": g.step, "checkpoint": g.checkpoint}
                for kinds in (("attention", "mlp"), ("attention",), ("mlp",), ("embedding",)):
                    if g.select(kinds):
                        row = at | {"kind": "+".join(kinds)} | g.mean(kinds)
                        found["summary"].append(row | {"norm": g.norm, "score": run.scores.get(g.step)})
                found["matrices"] += [at | _row(record) for record in g.records]
                found["modules"] += [at | {"module": m} | row for m, row in g.by_module().items()]
                for kind in ("attention", "mlp"):
                    layers = g.by_layer((kind,)).items()
                    found["layers"] += [at | {"layer": n, "kind": kind} | row for n, row in layers]
                found["skipped"] += [at | {"name": name, "why": why} for name, why in g.skipped]
            if run.trajectory is not None:
                _trajectory_tables(run, found)
        found |= {f"compare_{name}": table for name, table in self.comparison.items()}
        return found | {f"intervention_{name}": table for name, table in self.interventions.items()}

    def write(self, folder: str | Path, *, full: bool = False) -> None:
        """Writes result.json, and tables/*.csv and *.json, into a folder; made if missing."""
        folder = Path(folder).expanduser()
        (folder / "tables").mkdir(parents=True, exist_ok=True)
        _write(folder / "result.json", self.to_json(full=full))
        for name, table in self.tables().items():
            if table:
                _write_csv(folder / "tables" / f"{name}.csv", table)
                _write(folder / "tables" / f"{name}.json", json.dumps(_plain(table), allow_nan=False))


def _row(record: MatrixGeometry) -> dict[str, Any]:
    row = {"name": record.name, "layer": record.layer, "module": record.module, "kind": record.kind}
    row |= {"rows": record.shape[0], "columns": record.shape[1]}
    row |= {measure: getattr(record, measure) for measure in MEASURES}
    shares = zip(FRACTIONS, record.energy, strict=True)
    return row | {f"energy_{fraction:g}": share for fraction, share in shares}


def _trajectory_tables(run: Run, found: dict[str, Table]) -> None:
    way = run.trajectory
    aligned = {side: way.alignment(side) for side in ("left", "right")}
    overlaps = {side: way.overlap(side) for side in ("left", "right")}
    for t, step in enumerate(way.steps):
        row = {"run": run.name, "step": step, "norm": float(way.norms[t])}
        for side in ("left", "right"):
            known = aligned[side][t][np.isfinite(aligned[side][t])]
            row[f"{side}_alignment"] = float(known.mean()) if len(known) else None
            row[f"{side}_overlap"] = float(overlaps[side][t])
            found["alignment"] += [
                {"run": run.name, "step": step, "side": side, "index": i + 1, "cosine": float(value)}
                for i, value in enumerate(aligned[side][t])
            ]
        found["trajectories"].append(row | {"lock_in": way.lock_in()})


def _geometry_out(g: Geometry, full: bool) -> dict[str, Any]:
    content = {"base": g.base, "checkpoint": g.checkpoint, "step": g.step}
    content |= {"unchanged": g.unchanged, "skipped": g.skipped}
    records = []
    for each in g.records:
        values = each.singular_values if full else each.singular_values[:KEPT]
        records.append(asdict(each) | {"singular_values": _rounded(values)})
    return content | {"records": records}


def _geometry_in(content: dict[str, Any]) -> Geometry:
    records = []
    for each in content["records"]:
        changed = {"shape": tuple(each["shape"]), "energy": tuple(map(_number, each["energy"]))}
        changed["singular_values"] = np.array(each["singular_values"], np.float32)
        changed |= {measure: _number(each[measure]) for measure in MEASURES}
        records.append(MatrixGeometry(**each | changed))
    skipped = tuple(map(tuple, content["skipped"]))
    at = content["base"], content["checkpoint"], content["step"]
    return Geometry(*at, tuple(records), tuple(content["unchanged"]), skipped)


def _trajectory_out(way: Trajectory) -> dict[str, Any]:
    records = []
    for each in way.records:
        values = {f.name: getattr(each, f.name) for f in fields(each)}
        records.append({k: _rounded(v) if isinstance(v, np.ndarray) else v for k, v in values.items()})
    return {"base": way.base, "steps": way.steps, "skipped": way.skipped, "records": records}


def _trajectory_in(content: dict[str, Any]) -> Trajectory:
    records = tuple(
        MatrixTrajectory(
            **{k: np.array(v, np.float64) if isinstance(v, list) else v for k, v in each.items()}
        )
        for each in content["records"]
    )
    skipped = tuple(map(tuple, content["skipped"]))
    return Trajectory(content["base"], tuple(content["steps"]), records, skipped)


def _rounded(values: np.ndarray) -> list:
    """As lists of numbers with six digits: what is drawn needs no more."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.6g}") for value in values]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _plain(value: Any) -> Any:
    """What JSON can hold: no NaN, no numpy, no tuples."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_csv(path: Path, table: Table) -> None:
    columns = list(dict.fromkeys(key for row in table for key in row))
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_plain(table))
    part.replace(path)


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
