"""Finding the state of a transform within that of an optimiser."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def states_of(opt_state: Any, kind: type[T]) -> list[T]:
    """All states of a kind, in a chain, another wrapper, or an `nnx.Optimizer`, which puts each array into a
    variable: here they are arrays again."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [
        jax.tree.map(jnp.asarray, leaf, is_leaf=lambda x: hasattr(x, "__jax_array__"))
        for leaf in leaves
        if isinstance(leaf, kind)
    ]
