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


def numpy_adamw(params, gradients, rate, b1, b2, eps, decay, clip, kept=lambda first: first):
    """Decoupled weight decay behind a global-norm clip, float64; `kept` of the first moment is stored."""
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
            first[k] = kept(first[k])
    return params


@pytest.mark.parametrize(
    ("clip", "mu_dtype"), [(0.5, "float32"), (float("inf"), "float32"), (0.5, "bfloat16")]
)
def test_against_numpy(clip, mu_dtype):
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
        mu_dtype=mu_dtype,
    )
    optimizer = make_optimizer(config)
    got = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    state = init_optimizer(optimizer, got)
    for gradient in gradients:
        gradient = {k: jnp.asarray(g, jnp.float32) for k, g in gradient.items()}
        updates, state = optimizer.update(gradient, state, got)
        got = optax.apply_updates(got, updates)
    adam = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    assert {str(a.dtype) for a in adam.mu.values()} == {mu_dtype}
    assert {str(a.dtype) for a in adam.nu.values()} == {"float32"}
    plain, rounded = (
        numpy_adamw(
            dict(params), gradients, lambda t: 0.1 - 0.02 * t, 0.8, 0.95, 1e-6, 0.1, clip,
            kept=lambda first, dtype=dtype: np.asarray(first, dtype).astype(np.float64),
        )
        for dtype in (np.float64, jnp.bfloat16)
    )  # fmt: skip
    for k in params:
        expected = rounded if mu_dtype == "bfloat16" else plain
        np.testing.assert_allclose(got[k], expected[k], rtol=1e-5, atol=1e-6)
    assert max(np.abs(plain[k] - rounded[k]).max() for k in params) > 1e-4  # the two can be told apart


def test_a_bfloat16_second_moment_would_never_fall():
    """Why there is no option for it: where gradients vanish, 0.999 v is v again, whatever v is."""
    v = (1.0 + np.arange(128) / 128).astype(jnp.bfloat16)
    np.testing.assert_array_equal((0.999 * v.astype(np.float64)).astype(jnp.bfloat16), v)


def test_a_bfloat16_first_moment_in_a_subspace():
    """It is moved along with the basis, stays bfloat16, and leads to nearly the same place."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(8, 2, 16, 3)) @ rng.normal(size=(2, 3, 12))  # of one row space
    start, ends = {"up": jnp.ones((2, 16, 12))}, []
    for dtype in ("float32", "bfloat16"):
        project = ProjectConfig(rank=4, refresh=3, residual="error_feedback")
        config = OptimizerConfig(learning_rate=0.01, mu_dtype=dtype)
        optimizer = make_optimizer(config, ForesightConfig(project=project))
        params, state = start, init_optimizer(optimizer, start)
        dtypes = jax.tree.map(lambda a: a.dtype, state)
        update = jax.jit(optimizer.update)
        for gradient in gradients:
            updates, state = update({"up": jnp.asarray(gradient, jnp.float32)}, state, params)
            params = optax.apply_updates(params, updates)
        assert jax.tree.map(lambda a: a.dtype, state) == dtypes
        assert (jnp.bfloat16 in jax.tree.leaves(dtypes)) == (dtype == "bfloat16")
        ends.append(params["up"])
    np.testing.assert_allclose(*ends, atol=0.02 * float(jnp.abs(ends[0] - 1).max()))
    assert (ends[0] != ends[1]).any()


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
