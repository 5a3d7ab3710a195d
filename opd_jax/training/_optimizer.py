"""AdamW behind a global-norm clip, with any optax schedule, and the transforms that watch its updates."""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from opd_jax import transforms
from opd_jax.config import ForesightConfig, OptimizerConfig, make_schedule
from opd_jax.transforms import MatrixAxes, module_matrices
from opd_jax.transforms._matrices import path_name


def make_optimizer(
    config: OptimizerConfig, foresight: ForesightConfig | None = None, frozen: Collection[str] = ()
) -> optax.GradientTransformationExtraArgs:
    """clip_by_global_norm, then adamw, then what `foresight` asks for.

    Args:
        config: of the optimiser.
        foresight: None: nothing else.
        frozen: names of parameters that have no moments any more; only where `foresight.allocate` freezes.
    """
    foresight = foresight or ForesightConfig()
    track, allocate, project = foresight.track, foresight.allocate, foresight.project
    adamw = optax.adamw(
        make_schedule(config),
        # A Python number would be rounded with the moment that it multiplies: 0.9 is 0.8984 in bfloat16.
        b1=config.b1 if config.mu_dtype == "float32" else np.float32(config.b1),
        b2=config.b2,
        eps=config.eps,
        mu_dtype=config.mu_dtype,
        weight_decay=config.weight_decay,
    )
    if project.rank:
        adamw = transforms.project_to_subspace(
            adamw,
            project.rank,
            sides=project.sides,
            refresh=project.refresh,
            residual=project.residual,
            stop_after_lock_in=project.stop_after_lock_in,
        )
    parts = [optax.clip_by_global_norm(config.clip_norm), adamw]
    watch = []
    if track.rank:
        watch = [transforms.track_subspace(track.rank, track.every, track.of)]
    if track.of == "gradients":
        parts, watch = [*watch, *parts], []
    if not allocate.steps:
        return optax.with_extra_args_support(optax.chain(*parts, *watch))
    measure = transforms.allocate_modules(
        allocate.steps, allocate.mode, allocate.measure, fraction=allocate.fraction, matrices=modules
    )
    if allocate.mode != "freeze":
        return optax.chain(*parts, measure, *watch)
    inner = optax.masked(optax.chain(*parts), lambda params: _others(params, frozen))
    # Once it has spoken it goes, with its state; what stands before it keeps its place.
    return optax.with_extra_args_support(optax.chain(inner, *watch, *([] if frozen else [measure])))


def modules(params: Any) -> Any:
    """The matrices of `module_matrices`, the layers of a stack being one module."""

    def axes(leaf, found):
        stacked = found is not None and leaf.ndim == 3
        return MatrixAxes((0, 1), (2,)) if stacked else found

    return jax.tree.map(axes, params, module_matrices(params), is_leaf=lambda x: x is None)


def _others(params: Any, names: Collection[str]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) not in names, params)


def init_optimizer(optimizer: optax.GradientTransformation, params: Any) -> optax.OptState:
    """The optimiser's first state, its moments sharded as their parameters are."""
    return jax.jit(optimizer.init, out_shardings=optimizer_shardings(optimizer, params))(params)


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """Where each array of the optimiser's state belongs."""
    shapes = jax.eval_shape(optimizer.init, params)
    some = jax.tree.leaves(params)[0].sharding
    other = NamedSharding(some.mesh, PartitionSpec()) if isinstance(some, NamedSharding) else some

    def place(leaf, param):
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        if leaf.ndim != param.ndim or other is some:
            return other
        spec = (
            *param.sharding.spec,
            *[None] * param.ndim,
        )  # projected moments: the axes that are as they were
        kept = [s if n == of else None for s, n, of in zip(spec, leaf.shape, param.shape, strict=False)]
        return NamedSharding(param.sharding.mesh, PartitionSpec(*kept))

    return optax.tree.map_params(
        optimizer,
        place,
        shapes,
        params,
        transform_non_params=lambda part: jax.tree.map(lambda _: other, part),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


def carried(new: optax.OptState, old: optax.OptState) -> optax.OptState:
    """`new` with every array that `old` has in the same place."""
    before = dict(jax.tree_util.tree_leaves_with_path(old))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: before.get(path, leaf), new)
