"""What the watching transforms have found, for the log, and the freezing of modules that hardly move."""

from collections.abc import Collection
from typing import Any

import jax

from opd_jax.config import ForesightConfig
from opd_jax.training._optimizer import modules
from opd_jax.training._setup import Setup, still
from opd_jax.training._step import State
from opd_jax.transforms import frozen_modules, module_report, subspace_summary
from opd_jax.transforms._matrices import path_name


def dynamics(config: ForesightConfig, state: State, frozen: Collection[str]) -> dict[str, float]:
    """Metrics of `track_subspace` and `allocate_modules`, as far as they are in use."""
    found = {}
    if config.track.rank:
        found |= subspace_summary(state.opt_state, state.params, prefix="subspace/")
    if config.allocate.steps and not frozen:
        found |= module_report(state.opt_state, state.params, modules)
    return {name: float(value) for name, value in jax.device_get(found).items()}


def freeze_modules(setup: Setup, state: State) -> tuple[Setup, State, list[str], str]:
    """The run without gradients and moments of the modules that moved least.

    Returns:
        The run and its state from here on, the names of the frozen parameters, and what to say about it.
    """
    found = frozen_modules(state.opt_state, state.params, modules)
    names = sorted(name for name, is_frozen in found.items() if is_frozen.all())
    before = _bytes(state.opt_state)
    setup, state = still(setup, state, names)
    share = sum(leaf.size for name, leaf in _named(state.params) if name in names) / _size(state.params)
    return (
        setup,
        state,
        names,
        f"frozen: {', '.join(names) or 'nothing'} ({share:.0%} of the parameters); optimizer state "
        f"{before / 1e6:.1f} -> {_bytes(state.opt_state) / 1e6:.1f} MB (time: update_tokens_per_second)",
    )


def _named(params: Any) -> list[tuple[str, jax.Array]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
