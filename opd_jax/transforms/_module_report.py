"""What `allocate_modules` found, for loggers and for trainers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.transforms._allocate import AllocateState, _check_state, _selected
from opd_jax.transforms._matrices import Matrices, Matrix
from opd_jax.transforms._states import states_of


def frozen_modules(opt_state: Any, params: Any, matrices: Matrices = None) -> dict[str, np.ndarray]:
    """Which matrices `allocate_modules` has frozen, for a trainer that rebuilds its step without them.

    A host function. Where a leaf is True throughout, the parameter can go under `jax.lax.stop_gradient` and
    out of the optimiser (`optax.partition` with `optax.set_to_zero`): then its gradient is not computed and
    it has no moments.

    Args:
        opt_state: of `allocate_modules`, or of a chain with one.
        params: those that it was initialised with, or their shapes.
        matrices: as given to `allocate_modules`.

    Returns:
        For each selected leaf its dotted name and [stack] booleans, one for each stacked layer; all False
        inside the window and in other modes than "freeze".

    Raises:
        ValueError: if there is not one state of `allocate_modules`, or it is that of other parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from opd_jax.transforms import allocate_modules
        >>> params = {"up": jnp.ones((3, 2, 2)), "norm": {"scale": jnp.ones(2)}}
        >>> print(frozen_modules(allocate_modules(8, "freeze").init(params), params))
        {'up': array([False, False, False])}
    """
    state, found = _state_of(opt_state, params, matrices)
    return {m.name: np.asarray(factor) == 0 for m, factor in zip(found, state.allocate_factors, strict=True)}


def module_report(
    opt_state: Any, params: Any, matrices: Matrices = None, prefix: str = "modules"
) -> dict[str, jax.Array]:
    """What `allocate_modules` measured, as a flat dictionary of scalars for any logger; traceable.

    Args:
        opt_state: of `allocate_modules`, or of a chain with one.
        params: those that it was initialised with, or their shapes.
        matrices: as given to `allocate_modules`.
        prefix: of all names.

    Returns:
        float32 scalars. "<prefix>/<name>/measure", ".../rank" (0: the greatest) and ".../factor" of each
        matrix, the name followed by "[layer]" in a leaf of several; "<prefix>/steps", updates seen, and
        "<prefix>/frozen", the share of the selected parameters that are frozen.

    Raises:
        ValueError: if there is not one state of `allocate_modules`, or it is that of other parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> from opd_jax.transforms import allocate_modules
        >>> params = {"up": jnp.ones((2, 2))}
        >>> print(sorted(module_report(allocate_modules(8).init(params), params)))
        ['modules/frozen', 'modules/steps', 'modules/up/factor', 'modules/up/measure', 'modules/up/rank']
    """
    state, found = _state_of(opt_state, params, matrices)
    report, frozen = {}, jnp.zeros([])
    columns = dict(measure=state.allocate_measures, rank=state.allocate_ranks, factor=state.allocate_factors)
    for i, m in enumerate(found):
        for layer in range(m.shape[0]):
            name = f"{prefix}/{m.name}" + (f"[{layer}]" if m.shape[0] > 1 else "")
            for what, values in columns.items():
                report[f"{name}/{what}"] = values[i][layer].astype(jnp.float32)
        frozen += jnp.sum(state.allocate_factors[i] == 0) * math.prod(m.shape[1:])
    report[f"{prefix}/steps"] = state.allocate_count.astype(jnp.float32)
    report[f"{prefix}/frozen"] = frozen / sum(math.prod(m.shape) for m in found)
    return report


def _state_of(opt_state: Any, params: Any, matrices: Matrices) -> tuple[AllocateState, tuple[Matrix, ...]]:
    states = states_of(opt_state, AllocateState)
    if len(states) != 1:
        raise ValueError(f"the optimiser's state has {len(states)} states of allocate_modules, not one")
    found = _selected(params, matrices, "report")
    _check_state(states[0], found)
    return states[0], found
