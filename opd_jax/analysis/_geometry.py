"""The shape of the update W - W_base of every matrix: how large, how concentrated, in which layers."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opd_jax.analysis import _spectra
from opd_jax.analysis._cache import Cache, opened
from opd_jax.analysis._checkpoints import Checkpoint, open_checkpoint
from opd_jax.analysis._compute import base_norms, digests, spectra_of
from opd_jax.analysis._names import place_of
from opd_jax.analysis._pool import Progress

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Of the numerical rank, at which `MatrixGeometry.energy` is given."""
MEASURES = (
    "frobenius",
    "relative",
    "spectral",
    "ratio",
    "effective_rank",
    "top1_ratio",
    "numerical_rank",
)


@dataclass(frozen=True)
class MatrixGeometry:
    """One update dW = W - W_base, with singular values s_1 >= s_2 >= ...

    Attributes:
        name: Hugging Face name of the matrix.
        layer: from 0; None outside of the layers.
        module: "q", "k", "v", "o", "gate", "up", "down", "embedding", "head" or "other".
        kind: "attention", "mlp", "embedding" or "other".
        shape: (outputs, inputs).
        frobenius: ||dW||_F.
        relative: ||dW||_F / ||W_base||_F; NaN if the base is zero and the update is not.
        spectral: s_1.
        ratio: s_1 / ||dW||_F; 0 for a zero update, as all that follows.
        effective_rank: exp(-sum p_i log p_i), p_i = s_i / sum s.
        top1_ratio: sqrt(sum_{i <= k} s_i^2 / sum s_i^2), k = ceil(r / 100), r the numerical rank.
        numerical_rank: singular values above max(shape) 2^-23 s_1.
        energy: sum_{i <= k} s_i^2 / sum s_i^2, k = ceil(f r), for each f of `FRACTIONS`.
        singular_values: descending, float32; all of them, unless read back from a file.
    """

    name: str
    layer: int | None
    module: str
    kind: str
    shape: tuple[int, int]
    frobenius: float
    relative: float
    spectral: float
    ratio: float
    effective_rank: float
    top1_ratio: float
    numerical_rank: int
    energy: tuple[float, ...]
    singular_values: np.ndarray = field(compare=False, repr=False)

    def top_ratio(self, fraction: float) -> float:
        """`top1_ratio` for another fraction of the rank, in (0, 1].

        Raises:
            ValueError: if not all singular values were kept, or the fraction is out of range.
        """
        values = np.asarray(self.singular_values, np.float64)
        if len(values) < min(self.shape):
            raise ValueError(f"of {self.name} only {len(values)} singular values were kept")
        return float(np.sqrt(_spectra.leading_energy(values, self.numerical_rank, [fraction])[0]))


@dataclass(frozen=True)
class Geometry:
    """The updates of one checkpoint.

    Attributes:
        base: label of the base.
        checkpoint: label of the checkpoint.
        step: its training step, or None.
        records: one a matrix, in the order of the base.
        unchanged: names of the matrices that are equal to the base's; they have records, too.
        skipped: names that could not be compared, and why.
    """

    base: str
    checkpoint: str
    step: int | None
    records: tuple[MatrixGeometry, ...]
    unchanged: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def norm(self) -> float:
        """||dW||_F over all matrices."""
        return float(np.sqrt(sum(record.frobenius**2 for record in self.records)))

    def select(self, kinds: Iterable[str] = ("attention", "mlp")) -> tuple[MatrixGeometry, ...]:
        """The records of these kinds that are not zero."""
        kinds = set(kinds)
        return tuple(r for r in self.records if r.kind in kinds and r.frobenius > 0)

    def mean(self, kinds: Iterable[str] = ("attention", "mlp")) -> dict[str, float]:
        """Means of all measures over the matrices of these kinds that have changed, with their number as
        "matrices": for attention and MLP, Table 1 of the paper."""
        return _mean(self.select(kinds))

    def by_module(self) -> dict[str, dict[str, float]]:
        """`mean` for each module."""
        return _grouped(self.select(("attention", "mlp", "embedding", "other")), lambda r: r.module)

    def by_layer(self, kinds: Iterable[str] = ("attention", "mlp")) -> dict[int, dict[str, float]]:
        """`mean` for each layer, and "norm": ||dW||_F over the layer's matrices of these kinds."""
        chosen = [r for r in self.select(kinds) if r.layer is not None]
        return dict(sorted(_grouped(chosen, lambda r: r.layer).items()))

    def summary(self) -> str:
        """One line: what was compared and what was not."""
        text = f"{self.checkpoint}: {len(self.records)} matrices compared with {self.base}"
        if self.unchanged:
            everything = len(self.unchanged) == len(self.records)
            text += ", all of them equal" if everything else f", {len(self.unchanged)} of them equal"
        if self.skipped:
            shown = "; ".join(f"{name}: {why}" for name, why in self.skipped[:3])
            more = f"; and {len(self.skipped) - 3} more" * (len(self.skipped) > 3)
            text += f"; {len(self.skipped)} skipped ({shown}{more})"
        return text


def geometry(
    base: Any,
    checkpoint: Any,
    *,
    cache: Cache | str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Geometry | list[Geometry]:
    """Exact measures of the updates of a checkpoint, or of several.

    Tensors are read a block at a time and differences taken in float32; everything else is float64. See
    `opd_jax.analysis._spectra` for how the spectra are computed, and how exactly.

    Args:
        base: whatever `open_checkpoint` takes.
        checkpoint: the same, or a list of such; trees in memory are dicts, not lists.
        cache: folder for results; a second call reads them, an interrupted one goes on. None: no cache.
        workers: threads; None: as many as there are cores.
        progress: called with what happens, how much of it is done, and of how much; see `Bar`.

    Returns:
        A `Geometry`; for a list, a list of them. Matrices that are missing on one side, of other shapes, or
        not finite are left out and named in `skipped`.

    Raises:
        ValueError: if less than half of the matrices can be compared: those are different architectures.

    Example:
        >>> import numpy as np
        >>> base = {"mlp": {"up_proj": np.zeros((3, 4), np.float32)}}
        >>> tuned = {"mlp": {"up_proj": np.diag([4.0, 3.0, 0.0, 0.0]).astype(np.float32)[:3]}}
        >>> record = geometry(base, tuned).records[0]
        >>> record.module, record.frobenius, record.ratio, record.numerical_rank
        ('up', 5.0, 0.8, 2)

    References:
        Cai et al., *Learning to Foresee*, `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    base = open_checkpoint(base)
    several = isinstance(checkpoint, list | tuple)
    with opened(cache) as store:
        found = [
            _geometry(base, open_checkpoint(each, base=base), store, workers, progress)
            for each in (checkpoint if several else [checkpoint])
        ]
    return found if several else found[0]


def match(base: Checkpoint, checkpoint: Checkpoint) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of the matrices in both, of the same shape; and the others, with what is wrong.

    Raises:
        ValueError: if less than half of either side's matrices match.
    """
    here, there = dict.fromkeys(base.names()), dict.fromkeys(checkpoint.names())
    names, skipped = [], []
    for name in here:
        if name not in there:
            skipped.append((name, f"not in {checkpoint.label}"))
        elif base.shape(name) != checkpoint.shape(name):
            skipped.append(
                (name, f"{_size(base.shape(name))} in the base, {_size(checkpoint.shape(name))} here")
            )
        else:
            names.append(name)
    skipped += [(name, f"not in the base {base.label}") for name in there if name not in here]
    if 2 * len(names) < min(len(here), len(there)) or not names:
        kinds = [c.architecture or "architecture unknown" for c in (base, checkpoint)]
        first = "; ".join(f"{name}: {why}" for name, why in skipped[:3])
        raise ValueError(
            f"{base.label} ({kinds[0]}, {len(here)} matrices) and {checkpoint.label} ({kinds[1]}, "
            f"{len(there)} matrices) are different architectures: only {len(names)} matrices have the same "
            f"name and shape ({first})"
        )
    return names, skipped


def _geometry(base, checkpoint, cache, workers, progress) -> Geometry:
    names, skipped = match(base, checkpoint)
    found = digests([base, checkpoint], names, cache, workers, progress)
    norms = base_norms(base, names, found, cache, workers)
    spectra = spectra_of(base, checkpoint, names, found, cache, workers, progress)
    records, unchanged = [], []
    for name in names:
        norm, values = spectra[name]
        if not (np.isfinite(norms[name]) and np.isfinite(norm)):
            where = base.label if not np.isfinite(norms[name]) else checkpoint.label
            skipped.append((name, f"holds NaN or infinity in {where}"))
            continue
        records.append(record(name, base.shape(name), float(norm), norms[name], values))
        if norm == 0:
            unchanged.append(name)
    if not records:
        raise ValueError(f"no matrix of {checkpoint.label} can be compared: {skipped[0][0]} {skipped[0][1]}")
    return Geometry(
        base.label, checkpoint.label, checkpoint.step, tuple(records), tuple(unchanged), tuple(skipped)
    )


def record(
    name: str, shape: tuple[int, int], norm: float, base_norm: float, values: np.ndarray
) -> MatrixGeometry:
    """The measures of an update of that norm with these singular values, [r] float64, descending."""
    rank = _spectra.numerical_rank(values, shape)
    energy = _spectra.leading_energy(values, rank, FRACTIONS)
    return MatrixGeometry(
        name,
        *place_of(name),
        shape=shape,
        frobenius=norm,
        relative=norm / base_norm if base_norm > 0 else (0.0 if norm == 0 else float("nan")),
        spectral=float(values[0]),
        ratio=float(values[0]) / norm if norm > 0 else 0.0,
        effective_rank=_spectra.effective_rank(values),
        top1_ratio=math.sqrt(energy[FRACTIONS.index(0.01)]),
        numerical_rank=rank,
        energy=energy,
        singular_values=values.astype(np.float32),
    )


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _mean(records: Sequence[MatrixGeometry]) -> dict[str, float]:
    found: dict[str, float] = {"matrices": len(records)}
    for measure in MEASURES:
        values = [getattr(r, measure) for r in records]
        found[measure] = float(np.mean(values)) if values else float("nan")
    return found


def _grouped(records: Sequence[MatrixGeometry], key) -> dict[Any, dict[str, float]]:
    groups: dict[Any, list[MatrixGeometry]] = {}
    for each in records:
        groups.setdefault(key(each), []).append(each)
    return {
        name: _mean(group) | {"norm": float(np.sqrt(sum(r.frobenius**2 for r in group)))}
        for name, group in groups.items()
    }
