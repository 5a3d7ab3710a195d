"""How the update of every matrix came about: its norm, its leading directions, and when they were found."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opd_jax.analysis import _spectra
from opd_jax.analysis._cache import Cache, Results, cached, key_of, opened
from opd_jax.analysis._checkpoints import BLOCK, Checkpoint, open_checkpoint, rows_at_once
from opd_jax.analysis._compute import budget, digests, elements, spectrum_key
from opd_jax.analysis._geometry import match
from opd_jax.analysis._names import place_of
from opd_jax.analysis._pool import Job, Progress, run_jobs

_ARRAY = dict(compare=False, repr=False)


@dataclass(frozen=True)
class MatrixTrajectory:
    """The updates dW_1 ... dW_T of one matrix; u_k, v_k are the singular vectors of its k-th largest
    singular value, K = min(k, rank of the shape) of them.

    What is undefined, since an update is zero or a singular value too small to have a direction, is NaN.

    Attributes:
        name, layer, module, kind: see `MatrixGeometry`.
        norms: ||dW_t||_F, [T].
        left: |cos(u_k of dW_t, u_k of dW_T)|, [T, K].
        right: the same of v_k, [T, K].
        left_overlap: ||U_t^T U_T||_F^2 / K of the leading K directions together, [T]; K / m for random ones.
        right_overlap: the same of V, [T].
        heat: |U_1^T U_T|, [K, K]: directions of the first checkpoint down, of the last across.
        cosines: between the u_1 of all checkpoints, their signs chosen to agree with the last, [T, T].
    """

    name: str
    layer: int | None
    module: str
    kind: str
    norms: np.ndarray = field(**_ARRAY)
    left: np.ndarray = field(**_ARRAY)
    right: np.ndarray = field(**_ARRAY)
    left_overlap: np.ndarray = field(**_ARRAY)
    right_overlap: np.ndarray = field(**_ARRAY)
    heat: np.ndarray = field(**_ARRAY)
    cosines: np.ndarray = field(**_ARRAY)

    def path(self) -> tuple[np.ndarray, float]:
        """The way of u_1 in two dimensions, by PCA.

        Returns:
            [T, 2] coordinates, with the last checkpoint on the positive side of both axes, NaN where u_1 is
            undefined; and the explained variance ratio (l_1 + l_2) / sum l_i, NaN if nothing moves.
        """
        points, variances = self._principal()
        total = variances.sum()
        flat = np.zeros((len(points), 2))
        flat[:, : points.shape[1]] = points[:, :2] + 0.0  # no -0.0
        return flat, float(variances[:2].sum() / total) if total > 1e-12 else float("nan")

    def tsne(self, *, seed: int = 0, perplexity: float | None = None) -> np.ndarray:
        """The way of u_1 in two dimensions, by t-SNE, [T, 2]; NaN where u_1 is undefined, 0 if it
        never moves.

        Args:
            seed: of the embedding.
            perplexity: below the number of checkpoints; None: 30, or a third of that number if it is less.

        Raises:
            ImportError: without scikit-learn.
            ValueError: with fewer than 4 checkpoints.
        """
        from opd_jax._extras import require

        points, variances = self._principal()  # an isometry: t-SNE sees only distances
        defined = np.isfinite(np.diag(self.cosines))
        count = int(defined.sum())
        if count < 4:
            raise ValueError(f"t-SNE needs at least 4 checkpoints with a direction; there are {count}")
        manifold = require("sklearn.manifold", "analysis")
        perplexity = min(30.0, count / 3) if perplexity is None else perplexity
        flat = np.full((len(points), 2), np.nan)
        if variances.sum() <= 1e-12:  # scikit-learn would divide by it
            flat[defined] = 0.0
            return flat
        # Exact: for so few points as fast, and without the tree that crashes on what is not finite.
        found = manifold.TSNE(2, perplexity=perplexity, random_state=seed, init="pca", method="exact")
        with require("threadpoolctl", "analysis").threadpool_limits(1):  # for so few points, others only wait
            flat[defined] = found.fit_transform(points[defined].astype(np.float32))
        return flat

    def _principal(self) -> tuple[np.ndarray, np.ndarray]:
        """All principal coordinates [T, T'] and their variances, from the Gram matrix of unit vectors."""
        defined = np.isfinite(np.diag(self.cosines))
        g = self.cosines[np.ix_(defined, defined)]
        g = g - g.mean(0) - g.mean(1)[:, None] + g.mean() if len(g) else g
        variances, axes = np.linalg.eigh(g)
        variances, axes = np.maximum(variances[::-1], 0.0), axes[:, ::-1]
        points = axes * np.sqrt(variances)
        if len(points):
            points = points * np.where(points[-1] < 0, -1.0, 1.0)
        every = np.full((len(defined), points.shape[1]), np.nan)
        every[defined] = points
        return every, variances


@dataclass(frozen=True)
class Trajectory:
    """The updates of a run's checkpoints, matrix by matrix.

    Attributes:
        base: label of the base.
        steps: training steps, ascending, [T].
        records: one a matrix.
        skipped: names that could not be compared at every checkpoint, and why.
    """

    base: str
    steps: tuple[int, ...]
    records: tuple[MatrixTrajectory, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def select(self, kinds: Iterable[str] = ("attention", "mlp")) -> tuple[MatrixTrajectory, ...]:
        """The records of these kinds."""
        kinds = set(kinds)
        return tuple(record for record in self.records if record.kind in kinds)

    @property
    def norms(self) -> np.ndarray:
        """||dW_t||_F over all matrices, [T]."""
        return np.sqrt(np.sum([record.norms**2 for record in self.records], axis=0))

    def alignment(self, side: str = "left", kinds: Iterable[str] = ("attention", "mlp")) -> np.ndarray:
        """Mean over matrices of |cos| with the final direction of the same index, [T, K].

        Args:
            side: "left" or "right".
            kinds: of the matrices.
        """
        found = [getattr(record, side) for record in self.select(kinds)]
        width = max((each.shape[1] for each in found), default=0)
        padded = [np.pad(e, ((0, 0), (0, width - e.shape[1])), constant_values=np.nan) for e in found]
        return _nanmean(np.stack(padded), 0) if padded else np.zeros((len(self.steps), 0))

    def overlap(self, side: str = "left", kinds: Iterable[str] = ("attention", "mlp")) -> np.ndarray:
        """Mean over matrices of the overlap of the leading subspaces with the final ones, [T]."""
        found = [getattr(record, f"{side}_overlap") for record in self.select(kinds)]
        return _nanmean(np.stack(found), 0) if found else np.zeros(len(self.steps))

    def lock_in(
        self,
        threshold: float = 0.8,
        *,
        directions: int | None = None,
        kinds: Iterable[str] = ("attention", "mlp"),
    ) -> int:
        """The first step from which on the mean |cos| of leading left directions with the final ones stays at
        or above a threshold; at the latest the last.

        Args:
            threshold: in (0, 1].
            directions: how many leading ones count; None: all K.
            kinds: of the matrices.

        Raises:
            ValueError: if the threshold is not in (0, 1].
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold}")
        aligned = _nanmean(self.alignment("left", kinds)[:, :directions], 1)
        below = np.flatnonzero(~(aligned[:-1] >= threshold))
        return self.steps[below[-1] + 1 if len(below) else 0]


def trajectory(
    base: Any,
    checkpoints: Sequence[tuple[int, Any]],
    *,
    k: int = 20,
    cache: Cache | str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Trajectory:
    """Compares the leading k singular directions of every update with the final update's.

    Args:
        base: whatever `open_checkpoint` takes.
        checkpoints: (step, checkpoint) in any order; at least two.
        k: directions.
        cache: see `geometry`, whose results are kept along the way.
        workers: see `geometry`.
        progress: see `geometry`.

    Raises:
        ValueError: for fewer than two checkpoints, two of the same step, or different architectures.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> base, way = rng.normal(size=(2, 6, 4)).astype(np.float32)
        >>> tree = lambda w: {"up": w}
        >>> found = trajectory(tree(base), [(1, tree(base + 0.1 * way)), (2, tree(base + way))], k=2)
        >>> found.steps, bool(found.alignment()[0].min() > 0.99), found.lock_in()
        ((1, 2), True, 1)

    References:
        Cai et al., *Learning to Foresee*, `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    check_steps([(step, str(each)) for step, each in checkpoints])
    base = open_checkpoint(base)
    ordered = sorted(checkpoints, key=lambda pair: pair[0])
    opened_ones = [open_checkpoint(each, base=base, step=step) for step, each in ordered]
    steps = tuple(step for step, _ in ordered)
    names, skipped = list(base.names()), {}
    for checkpoint in opened_ones:
        matched, wrong = match(base, checkpoint)
        names = [name for name in names if name in set(matched)]
        skipped = dict(wrong) | skipped
    with opened(cache) as store:
        found = digests([base, *opened_ones], names, store, workers, progress)
        jobs = [_job(base, opened_ones, name, k, store, found) for name in names]
        limit = budget([base], names)
        results = run_jobs(jobs, "trajectories", budget=limit, workers=workers, progress=progress)
    records = []
    for name, result in zip(names, results, strict=True):
        if np.isfinite(result["norms"]).all():
            records.append(MatrixTrajectory(name, *place_of(name), **result))
        else:
            step = steps[int(np.flatnonzero(~np.isfinite(result["norms"]))[0])]
            skipped[name] = f"holds NaN or infinity in the base or at step {step}"
    if not records:
        raise ValueError(f"no matrix can be followed: {next(iter(skipped.items()))}")
    return Trajectory(base.label, steps, tuple(records), tuple(skipped.items()))


def check_steps(checkpoints: Sequence[tuple[int | None, str]]) -> None:
    """Raises ValueError unless these (step, label) make a trajectory."""
    if len(checkpoints) < 2:
        raise ValueError(
            f"a trajectory needs at least two checkpoints, at different steps; got {len(checkpoints)}"
        )
    seen: dict[int, str] = {}
    for step, label in checkpoints:
        if isinstance(step, bool) or not isinstance(step, int | np.integer):
            raise ValueError(f"the step of {label[:80]} is {step!r}; it must be an integer: give the steps")
        if step in seen:
            raise ValueError(f"{seen[step][:80]} and {label[:80]} both are of step {step}; give their steps")
        seen[step] = label


def _job(base: Checkpoint, checkpoints: list[Checkpoint], name: str, k: int, cache, found) -> Job:
    m, n = base.shape(name)
    short, times = min(m, n), len(checkpoints)
    key, keys = None, [None] * times
    if found is not None:
        of = [found[i, name] for i in range(times + 1)]
        key = key_of("trajectory", k, *of)
        keys = [None if each == of[0] else spectrum_key(of[0], each) for each in of[1:]]

    def compute() -> Results:
        with np.errstate(all="ignore"):
            return _follow(base, checkpoints, name, min(k, short), lambda t, r: keep(keys[t], r))

    def keep(key: str | None, results: Results) -> None:
        if key is not None:
            cache.store(key, results)

    kept = 4 * times * min(k, short) * (m + n)
    size = 20 * min(m * n, 2 * BLOCK) + (4 * m * n if m < n else 0) + 32 * short**2 + kept
    cost = times * (elements(base, name) * short + 10.0 * short**3)
    return Job(lambda: cached(cache, key, compute), size, cost)


def _follow(base, checkpoints, name: str, k: int, keep: Callable[[int, Results], None]) -> Results:
    shape = base.shape(name)
    sides = [_leading(base, each, name, k, lambda r, t=t: keep(t, r)) for t, each in enumerate(checkpoints)]
    norms = np.array([norm for norm, _, _ in sides])
    u, v = (np.stack([side[i] for side in sides]) for i in (1, 2))  # [T, m, k], [T, n, k]
    first = u[:, :, 0].astype(np.float64)
    cosines = first @ first[-1]
    first = first * np.where(cosines < 0, -1.0, 1.0)[:, None]
    results = {"norms": norms, "cosines": first @ first.T}
    for label, vectors in (("left", u), ("right", v)):
        inner = np.einsum("tmk,ml->tkl", vectors, vectors[-1], optimize=True).astype(np.float64)
        results[label] = np.minimum(np.abs(np.diagonal(inner, axis1=1, axis2=2)), 1.0)
        results[f"{label}_overlap"] = np.minimum(np.sum(inner**2, axis=(1, 2)) / k, 1.0)
        if label == "left":
            results["heat"] = np.minimum(np.abs(inner[0]), 1.0)
    assert u.shape[1:] == (shape[0], k)
    return results


def _leading(
    base: Checkpoint, checkpoint: Checkpoint, name: str, k: int, keep: Callable[[Results], None]
) -> tuple[float, np.ndarray, np.ndarray]:
    """||dW||_F and its leading singular vectors [m, k], [n, k] float32, NaN where there are none."""
    m, n = base.shape(name)
    rows = rows_at_once((m, n))
    u, v = np.full((m, k), np.nan, np.float32), np.full((n, k), np.nan, np.float32)

    def blocks():
        return checkpoint.difference(base, name, rows)

    g = _spectra.gram(blocks(), (m, n))
    norm = float(np.sqrt(np.trace(g)))
    if not np.isfinite(norm) or norm == 0:
        return norm, u, v
    values = _spectra.values_of(g, blocks, (m, n))
    keep({"norm": np.float64(norm), "values": values})
    short = _spectra.leading_vectors(g, values, k)
    known = values[:k] > max(m, n) * float(np.finfo(np.float32).eps) * values[0]  # else: rounding
    short[:, ~known] = np.nan
    scaled = short / np.where(known, values[:k], 1.0)
    if m >= n:
        v[:] = short
        for i, block in enumerate(blocks()):
            u[i * rows : i * rows + len(block)] = block.astype(np.float64) @ scaled
    else:
        u[:] = short
        v[:] = sum(
            block.T.astype(np.float64) @ scaled[i * rows : i * rows + len(block)]
            for i, block in enumerate(blocks())
        )
    return norm, u, v


def _nanmean(x: np.ndarray, axis: int) -> np.ndarray:
    """The mean of what is not NaN; NaN if everything is."""
    known = np.isfinite(x)
    count = known.sum(axis)
    total = np.where(known, x, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
