"""What `track_subspace` found, for loggers."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.transforms import spectrum
from opd_jax.transforms._matrices import Matrices, Matrix, select
from opd_jax.transforms._products import Pair, paired
from opd_jax.transforms._states import states_of
from opd_jax.transforms._track import Probe, TrackSubspaceState, check_state


def subspace_summary(
    state: Any, params: Any, *, matrices: Matrices = None, prefix: str = ""
) -> dict[str, jax.Array]:
    """What `track_subspace` has found, as named float32 scalars for a logger.

    For each selected leaf (mean over its stacked layers), for the means over attention, MLP and all matrices,
    and for the lower, middle and upper third of the layers: `spectral_norm`, `spectral_ratio`, `energy`,
    `effective_rank`, `overlap` (with the probe before), `first_overlap`, and `locked_in`, the share of
    matrices that are. `lock_in` is the step since which at least half of them are, -1 if they are not.

    Args:
        state: of `track_subspace`, or of a chain that holds one.
        params: the parameters, or shapes, for the names.
        matrices: as given to `track_subspace`.
        prefix: of every name.

    Raises:
        ValueError: if there is no such state, or several; or it is not that of these parameters.
    """
    state = _state_of(state)
    found = select(params, matrices, "subspace_summary")
    pairs = paired(found)
    found = pairs if len(pairs) == len(state.track_probes) else found
    check_state(found, state.track_probes, 0)
    rows: dict[str, list[dict[str, jax.Array]]] = {}
    depth = _layers(found)
    for matrix, probe in zip(found, state.track_probes, strict=True):
        measures = _measures(probe)
        groups = {matrix.name, "all"} | {matrix.kind} & {"attention", "mlp"}  # a leaf may be called "mlp"
        for group in sorted(groups):
            rows.setdefault(group, []).append(measures)
        bands = np.array(_bands(matrix, depth))
        for band, name in enumerate(("lower", "middle", "upper")):
            if len(inside := np.flatnonzero(bands == band)):
                part = {key: value[inside] for key, value in measures.items()}
                rows.setdefault(f"{name}_layers", []).append(part)
    out = {}
    for group, parts in rows.items():
        for key in parts[0]:
            out[f"{prefix}{group}/{key}"] = jnp.mean(jnp.concatenate([part[key] for part in parts]))
    steps = jnp.concatenate([probe.lock_in for probe in state.track_probes]).astype(jnp.float32)
    steps = jnp.sort(jnp.where(steps < 0, jnp.inf, steps))
    middle = steps[(len(steps) - 1) // 2]
    out[f"{prefix}lock_in"] = jnp.where(jnp.isfinite(middle), middle, -1.0)
    return out


def _measures(probe: Probe) -> dict[str, jax.Array]:
    spectral = probe.values[:, 0]
    return {
        "spectral_norm": spectral,
        "spectral_ratio": spectrum.spectral_ratio(spectral, probe.norm),
        "energy": probe.energy,
        "effective_rank": probe.effective_rank,
        "overlap": probe.overlap,
        "first_overlap": probe.first_overlap,
        "locked_in": (probe.lock_in >= 0).astype(jnp.float32),
    }


def _layer(name: str) -> int | None:
    """The layer that a leaf belongs to, where layers are not stacked."""
    number = re.search(r"(?:^|[._])(\d+)(?=[._]|$)", name)
    return int(number[1]) if number else None


def _bands(matrix: Matrix | Pair, depth: int) -> list[int]:
    """Of each matrix in a stack, the third of the layers that it is in: 0, 1 or 2; -1 if there are not 3."""
    stack, layer = matrix.shape[0], _layer(matrix.name)
    if layer is not None:  # its stack is inside of a layer, such as experts
        return [3 * layer // depth if depth >= 3 else -1] * stack
    # Layers come first in a stack: [layers, experts] is cut into thirds as [layers] is.
    return [3 * i // stack if stack >= 3 else -1 for i in range(stack)]


def _layers(found: tuple[Matrix | Pair, ...]) -> int:
    """How many layers the names count."""
    return max((layer + 1 for m in found if (layer := _layer(m.name)) is not None), default=1)


def _state_of(state: Any) -> TrackSubspaceState:
    found = states_of(state, TrackSubspaceState)
    if len(found) != 1:
        raise ValueError(f"subspace_summary: the state holds {len(found)} of track_subspace, it must be one")
    return found[0]
