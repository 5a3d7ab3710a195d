"""Spectra of updates, from the cache or computed, on all cores and within bounds of memory."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from opd_jax.analysis import _spectra
from opd_jax.analysis._cache import Cache, cached, key_of
from opd_jax.analysis._checkpoints import BLOCK, Checkpoint, rows_at_once
from opd_jax.analysis._pool import Job, Progress, run_jobs

_SMALL = 1 << 17  # elements; matrices up to this size are computed many at a time


def digests(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    cache: Cache | None,
    workers: int | None,
    progress: Progress | None,
) -> dict[tuple[int, str], str] | None:
    """Digests by (number of the checkpoint, name); None without a cache, which alone needs them."""
    if cache is None:
        return None
    wanted = [(i, name) for i in range(len(checkpoints)) for name in names]
    jobs = [
        Job(lambda i=i, n=name: cache.digest(checkpoints[i], n), 4 * BLOCK, elements(checkpoints[i], name))
        for i, name in wanted
    ]
    found = run_jobs(jobs, "reading", budget=budget(checkpoints, names), workers=workers, progress=progress)
    return dict(zip(wanted, found, strict=True))


def budget(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> int:
    """Bytes of memory that jobs may take: thrice the largest tensor, in float32."""
    largest = max(elements(checkpoint, name) for checkpoint in checkpoints for name in names)
    return max(12 * largest, 64 << 20)


def spectrum_key(base_digest: str, digest: str) -> str:
    """Where the spectrum of an update is kept."""
    return key_of("spectrum", base_digest, digest)


def base_norms(
    base: Checkpoint, names: Sequence[str], found: dict | None, cache: Cache | None, workers: int | None
) -> dict[str, float]:
    """||W_base||_F of the matrices; NaN or infinity if they hold any."""

    def norm(name: str) -> dict[str, np.ndarray]:
        with np.errstate(all="ignore"):
            blocks = (b.astype(np.float64) for b in base.blocks(name, rows_at_once(base.shape(name))))
            return {"norm": np.sqrt(sum(np.vdot(b, b) for b in blocks))}

    def norms(group: list[str]) -> list[dict[str, np.ndarray]]:
        keys = [None if found is None else key_of("norm", found[0, name]) for name in group]
        return [cached(cache, k, lambda n=n: norm(n)) for n, k in zip(group, keys, strict=True)]

    groups = _groups(base, {name: name for name in names})
    jobs = [
        Job(lambda g=g: norms(g), 20 * BLOCK, float(sum(elements(base, name) for name in g))) for g in groups
    ]
    results = run_jobs(jobs, "", budget=budget([base], names), workers=workers, progress=None)
    pairs = zip(groups, results, strict=True)
    return {n: float(r["norm"]) for group, rs in pairs for n, r in zip(group, rs, strict=True)}


def spectra_of(
    base, checkpoint, names, found, cache, workers, progress
) -> dict[str, tuple[float, np.ndarray]]:
    """(norm, singular values) of every update; those of equal content are computed once."""
    results: dict[str, tuple[float, np.ndarray]] = {}
    todo: dict[str, list[str]] = {}  # key -> names
    for name in names:
        if found is None:
            todo[name] = [name]
        elif found[0, name] == found[1, name]:
            results[name] = (0.0, np.zeros(min(base.shape(name))))
        else:
            todo.setdefault(spectrum_key(found[0, name], found[1, name]), []).append(name)
    for key in list(todo):
        if found is not None and (kept := cache.load(key)) is not None:
            results |= dict.fromkeys(todo.pop(key), (float(kept["norm"]), kept["values"]))
    groups = _groups(base, {key: same[0] for key, same in todo.items()})

    def run(keys: list[str]) -> list[tuple[float, np.ndarray]]:
        with np.errstate(all="ignore"):
            computed = _compute(base, checkpoint, [todo[key][0] for key in keys])
        for key, (norm, values) in zip(keys, computed, strict=True):
            if cache is not None:
                cache.store(key, {"norm": np.float64(norm), "values": values})
        return computed

    jobs = [_job(base, [todo[key][0] for key in keys], lambda keys=keys: run(keys)) for keys in groups]
    limit = budget([base], names)
    what = f"spectra of {checkpoint.label}"
    computed = run_jobs(jobs, what, budget=limit, workers=workers, progress=progress)
    for keys, values in zip(groups, computed, strict=True):
        for key, value in zip(keys, values, strict=True):
            results |= dict.fromkeys(todo[key], value)
    return results


def _groups(base: Checkpoint, wanted: dict[str, str]) -> list[list[str]]:
    """Keys in groups of one shape: small matrices by the block, large ones alone."""
    by_shape: dict[tuple[int, int], list[str]] = {}
    for key, name in wanted.items():
        by_shape.setdefault(base.shape(name), []).append(key)
    groups = []
    for (m, n), keys in by_shape.items():
        size = max(1, BLOCK // 4 // (m * n)) if m * n <= _SMALL else 1
        groups += [keys[i : i + size] for i in range(0, len(keys), size)]
    return groups


def _job(base: Checkpoint, names: list[str], run) -> Job:
    m, n = base.shape(names[0])
    short, blocks = min(m, n), 20 * min(m * n * len(names), 2 * BLOCK)
    whole = 4 * m * n if m < n else 0
    grams = 24 * len(names) * short**2  # the sum, a summand or LAPACK's copy, and its work space
    return Job(run, blocks + whole + grams, len(names) * (m * n * short + 4.0 * short**3))


def _compute(base: Checkpoint, checkpoint: Checkpoint, names: list[str]) -> list[tuple[float, np.ndarray]]:
    """(norm, singular values) of the updates of some matrices of one shape."""
    shape = base.shape(names[0])
    rows = rows_at_once(shape)
    if shape[0] * shape[1] > _SMALL:
        (name,) = names
        return [spectrum(lambda: checkpoint.difference(base, name, rows), shape)]
    stack = np.stack([np.concatenate(list(checkpoint.difference(base, name, rows))) for name in names])
    norms = np.sqrt(np.sum(np.square(stack, dtype=np.float64), axis=(1, 2)))
    finite = np.isfinite(norms)
    values = np.full((len(names), min(shape)), np.nan)
    if finite.any():
        values[finite] = _spectra.singular_values(stack[finite])
    return list(zip(norms, values, strict=True))


def spectrum(blocks: Callable[[], Iterator[np.ndarray]], shape: tuple[int, int]) -> tuple[float, np.ndarray]:
    """(norm, singular values) of the matrix that `blocks()` gives by rows; NaN if it is not finite."""
    g = _spectra.gram(blocks(), shape)
    norm = float(np.sqrt(np.trace(g)))
    if not np.isfinite(norm):
        return norm, np.full(len(g), np.nan)
    return norm, _spectra.values_of(g, blocks, shape)


def elements(checkpoint: Checkpoint, name: str) -> int:
    m, n = checkpoint.shape(name)
    return m * n
