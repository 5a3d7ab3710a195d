"""AdamW against numpy, schedules against their formulas, and where the state lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from opd_jax.config import ForesightConfig, OptimizerConfig, ProjectConfig
from opd_jax.parallel import make_mesh, param_shardings
from opd_jax.training._optimizer import init_optimizer, make_optimizer, make_schedule


def numpy_adamw(params, gradients, rate, b1, b2, eps, decay, clip):
    """Decoupled weight decay behind a global-norm clip, float64."""
    first = {k: 0.0 for k in params}
    second = {k: 0.0 for k in params}
    for t, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        factor = min(1.0, clip / norm)
        for k in params:
            g = gradient[k] * factor
            first[k] = b1 * first[k] + (1 - b1) * g
            second[k] = b2 * second[k] + (1 - b2) * g**2
            m, v = first[k] / (1 - b1**t), second[k] / (1 - b2**t)
            params[k] = params[k] - rate(t - 1) * (m / (np.sqrt(v) + eps) + decay * params[k])
    return params


@pytest.mark.parametrize("clip", [0.5, float("inf")])
def test_against_numpy(clip):
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)}
    gradients = [{k: rng.normal(0, 10.0**-n, v.shape) for k, v in params.items()} for n in range(4)]
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="linear_schedule",
        schedule_options=dict(end_value=0.02, transition_steps=4),
        b1=0.8,
        b2=0.95,
        eps=1e-6,
        weight_decay=0.1,
        clip_norm=clip,
    )
    optimizer = make_optimizer(config)
    got = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    state = init_optimizer(optimizer, got)
    for gradient in gradients:
        gradient = {k: jnp.asarray(g, jnp.float32) for k, g in gradient.items()}
        updates, state = optimizer.update(gradient, state, got)
        got = optax.apply_updates(got, updates)
    expected = numpy_adamw(params, gradients, lambda t: 0.1 - 0.02 * t, 0.8, 0.95, 1e-6, 0.1, clip)
    for k in params:
        np.testing.assert_allclose(got[k], expected[k], rtol=1e-5, atol=1e-6)


def test_zero_gradient_without_a_clip():
    """A step with nothing to learn is no division by zero."""
    optimizer = make_optimizer(OptimizerConfig(clip_norm=float("inf")))
    params = {"a": jnp.ones(3)}
    updates, _ = optimizer.update({"a": jnp.zeros(3)}, init_optimizer(optimizer, params), params)
    np.testing.assert_array_equal(updates["a"], np.zeros(3))


@pytest.mark.parametrize(
    ("schedule", "options", "values"),
    [
        ("constant_schedule", {}, {0: 0.5, 100: 0.5}),
        ("linear_schedule", dict(end_value=0.1, transition_steps=10), {0: 0.5, 5: 0.3, 20: 0.1}),
        ("cosine_decay_schedule", dict(decay_steps=10), {0: 0.5, 5: 0.25, 10: 0.0}),
        (
            "warmup_cosine_decay_schedule",
            dict(init_value=0.0, warmup_steps=4, decay_steps=14, end_value=0.1),
            {0: 0.0, 2: 0.25, 4: 0.5, 9: 0.3, 14: 0.1},
        ),
        ("warmup_constant_schedule", dict(init_value=0.1, warmup_steps=4), {0: 0.1, 4: 0.5, 9: 0.5}),
        ("exponential_decay", dict(transition_steps=1, decay_rate=0.5), {0: 0.5, 2: 0.125}),
    ],
)
def test_schedules(schedule, options, values):
    """`learning_rate` is the main value: the peak where there is one, else the start."""
    rate = make_schedule(OptimizerConfig(learning_rate=0.5, schedule=schedule, schedule_options=options))
    for step, value in values.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), None])
def test_moments_lie_where_their_parameters_lie(make_model, shape):
    _, params = nnx.split(make_model())
    if shape is not None:
        mesh = make_mesh(*shape)
        params = jax.device_put(params, param_shardings(params, mesh))
    optimizer = make_optimizer(OptimizerConfig())
    state = init_optimizer(optimizer, params)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(optimizer.init, params))
    adam = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    for moments in (adam.mu, adam.nu):
        for moment, param in zip(jax.tree.leaves(moments), jax.tree.leaves(params), strict=True):
            assert moment.sharding == param.sharding and moment.shape == param.shape
            assert moment.dtype == jnp.float32 and not moment.any()
    devices = jax.tree.leaves(params)[0].sharding.device_set
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.device_set == devices
    assert adam.count.sharding.is_fully_replicated


def test_projected_moments_keep_the_axes_that_they_have_in_common(make_model):
    """Of a kernel [L, in, out] over (fsdp, tensor): [L, k, out] stays over tensor, [L, in, k] over fsdp."""
    _, params = nnx.split(make_model())
    mesh = make_mesh(2, 2, 2)
    params = jax.device_put(params, param_shardings(params, mesh))
    optimizer = make_optimizer(OptimizerConfig(), ForesightConfig(project=ProjectConfig(rank=4)))
    state = init_optimizer(optimizer, params)
    adam = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    axes = set()
    for moment, param in zip(jax.tree.leaves(adam.mu), jax.tree.leaves(params), strict=True):
        for axis, (size, whole) in enumerate(zip(moment.shape, param.shape, strict=True)):
            if size == whole:  # as split as the parameter's axis
                assert (
                    moment.sharding.shard_shape(moment.shape)[axis]
                    == param.sharding.shard_shape(param.shape)[axis]
                )
            else:
                assert size == 4
                axes.add((moment.ndim, axis))
    assert axes == {(3, 1), (3, 2)}
