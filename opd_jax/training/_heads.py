"""Unembedding in a loop over chunks of tokens: each device with rows of its own has its own matrix."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from opd_jax.models._protocol import LanguageModel, unembed
from opd_jax.parallel import ROWS, row_shards


def unembedder(model: LanguageModel, rows: int) -> Callable[[jax.Array], jax.Array]:
    """What turns hidden states [rows, n, D] into logits [rows, n, V] float32; to be made before the loop.

    A matrix that is spread over the devices of the rows would be gathered, and its gradient be summed over
    them, in every turn of a loop: with a chunk for each of 16 turns, 16 times the bytes. So each of these
    devices gets a copy, which is one gathering, and sums its own gradient, which is one reduction at the end.
    The copies are a leading axis of the parameters, and its sharding says whose each is.
    """
    count = _devices(rows)
    if count == 1 or not hasattr(model, "unembed"):
        return lambda hidden: unembed(model, hidden)
    graphdef, state = nnx.split(model)
    copies = jax.tree.map(lambda leaf: _copies(leaf, count), state)

    def logits(hidden: jax.Array) -> jax.Array:
        own = hidden.reshape(count, rows // count, *hidden.shape[1:])
        out = jax.vmap(lambda state, hidden: unembed(nnx.merge(graphdef, state), hidden))(copies, own)
        return out.reshape(rows, *out.shape[2:])

    return logits


def _devices(rows: int) -> int:
    """Into how many parts the mesh that `jax.set_mesh` has set spreads the rows; 1: all together."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return 1
    count = row_shards()
    return count if all(name in mesh.shape for name in ROWS) and rows % count == 0 else 1


def _copies(leaf: jax.Array, count: int) -> jax.Array:
    copies = jnp.broadcast_to(leaf, (count, *leaf.shape))
    return jax.lax.with_sharding_constraint(copies, P(ROWS, *[P.UNCONSTRAINED] * leaf.ndim))
