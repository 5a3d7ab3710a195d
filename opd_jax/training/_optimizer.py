"""AdamW behind a global-norm clip, with any optax schedule."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax.config import OptimizerConfig, make_schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """clip_by_global_norm, then adamw."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )


def init_optimizer(optimizer: optax.GradientTransformation, params: Any) -> optax.OptState:
    """The optimiser's first state, its moments sharded as their parameters are."""
    shapes = jax.eval_shape(optimizer.init, params)
    some = jax.tree.leaves(params)[0].sharding
    other = NamedSharding(some.mesh, PartitionSpec()) if isinstance(some, NamedSharding) else some
    shardings = optax.tree.map_params(
        optimizer,
        lambda _, param: param.sharding,
        shapes,
        params,
        transform_non_params=lambda _: other,
    )
    return jax.jit(optimizer.init, out_shardings=shardings)(params)
