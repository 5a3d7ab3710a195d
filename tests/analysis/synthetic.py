"""Results of any size without any model: for how the report looks and how long it takes."""

import numpy as np

from opd_jax.analysis import Geometry, MatrixTrajectory, Result, Run, Trajectory
from opd_jax.analysis._geometry import record
from opd_jax.analysis._names import place_of

_NAMES = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
SHAPE = (384, 256)


def names_of(layers):
    return [f"model.layers.{i}.{name}_proj.weight" for i in range(layers) for name in _NAMES]


def synthetic(layers=30, checkpoints=20, run="opd", seed=0, k=20):
    """A result of one run with power-law spectra that grow, and directions that settle."""
    rng = np.random.default_rng(seed)
    steps = tuple(10 * (t + 1) for t in range(checkpoints))
    names, found = names_of(layers), []
    slopes = rng.uniform(0.5, 1.5, len(names))
    for t in range(checkpoints):
        size = np.sqrt((t + 1) / checkpoints)
        records = []
        for name, slope in zip(names, slopes, strict=True):
            values = size * np.arange(1, SHAPE[1] + 1) ** -slope
            records.append(record(name, SHAPE, float(np.linalg.norm(values)), 50.0, values))
        found.append(Geometry("base", f"step-{steps[t]}", steps[t], tuple(records)))
    ways = []
    for i, name in enumerate(names):
        norms = np.array([g.records[i].frobenius for g in found])
        left, right = (np.minimum(1, rng.uniform(0.3, 1.2, (checkpoints, k))) for _ in range(2))
        left[-1] = right[-1] = 1
        u = rng.normal(size=(checkpoints, 30)).cumsum(0)
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        heat = rng.uniform(0, 1, (k, k))
        overlaps = left.mean(1) ** 2, right.mean(1) ** 2
        ways.append(MatrixTrajectory(name, *place_of(name), norms, left, right, *overlaps, heat, u @ u.T))
    scores = {step: 0.4 + 0.4 * step / steps[-1] for step in steps}
    return Result("base", (Run(run, tuple(found), Trajectory("base", steps, tuple(ways)), scores),))
