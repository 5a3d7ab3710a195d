"""What every transform must do to be used like any other of optax: one table of transforms, one of checks."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import transforms

pytestmark = pytest.mark.usefixtures("quick_compilation")


def score(params):
    return -sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))


TRANSFORMS = {
    "track updates": lambda: transforms.track_subspace(rank=2, every=2),
    "track displacement": lambda: transforms.track_subspace(rank=2, every=2, of="displacement"),
    "report": lambda: transforms.allocate_modules(2),
    "scale": lambda: transforms.allocate_modules(2, "scale"),
    "freeze": lambda: transforms.allocate_modules(2, "freeze"),
    "project": lambda: transforms.project_to_subspace(optax.scale_by_adam(), rank=2, refresh=2),
    "error feedback": lambda: transforms.project_to_subspace(
        optax.trace(0.9), rank=2, refresh=2, residual="error_feedback"
    ),
    "extrapolate": lambda: transforms.extrapolate(score),
}
PARAMS = {
    "embedding": jnp.ones((16, 8)),
    "layers": {"up": jnp.ones((3, 8, 16)), "norm": {"scale": jnp.ones((3, 8))}},
    "down": jnp.ones((16, 8)),
    "bias": jnp.ones(8),
}


@pytest.fixture(params=TRANSFORMS)
def transform(request):
    return TRANSFORMS[request.param]()


def gradients(seed, params=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(0.01 * rng.normal(size=p.shape), p.dtype), params)


def steps(optimizer, count=3, params=PARAMS):
    """Parameters and state after some compiled steps."""
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(count):
        params, state = step(params, state, gradients(seed, params))
    return params, state


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


def finite(tree):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.float32)


def kinds(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_state_keeps_structure_shapes_and_dtypes_and_nothing_is_compiled_twice(transform, compilations):
    state = transform.init(PARAMS)
    update = jax.jit(transform.update)
    for seed in range(4):
        grads = gradients(seed)
        with compilations() as compiled:
            updates, new = update(grads, state, PARAMS)
        assert seed == 0 or not compiled
        assert kinds(new) == kinds(state) and kinds(updates) == kinds(grads)
        state = new
    finite(updates)


def test_abstract_parameters(transform):
    shapes = jax.eval_shape(lambda: PARAMS)
    assert kinds(jax.eval_shape(transform.init, shapes)) == kinds(transform.init(PARAMS))


def test_in_a_chain_by_keyword_and_with_extra_arguments(transform):
    chain = optax.named_chain(("clip", optax.clip_by_global_norm(1.0)), ("ours", transform))
    state = chain.init(PARAMS)
    updates, state = chain.update(updates=gradients(0), state=state, params=PARAMS, value=1.0, other="x")
    finite(updates)
    assert set(state) == {"clip", "ours"}


def test_scan_over_steps_is_a_loop_over_steps(transform):
    optimizer = optax.chain(optax.sgd(0.1), transform)
    many = [gradients(seed) for seed in range(3)]

    def step(carry, grads):
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (PARAMS, optimizer.init(PARAMS))
    scanned, _ = jax.lax.scan(step, start, jax.tree.map(lambda *a: jnp.stack(a), *many))
    same(scanned[0], steps(optimizer)[0])


def test_donation(transform):
    """The state's buffers may be used again: nothing in it is shared with another leaf or with constants."""
    kept, given = transform.init(PARAMS), transform.init(PARAMS)
    donating, plain = jax.jit(transform.update, donate_argnums=1), jax.jit(transform.update)
    for seed in range(3):
        expected, kept = plain(gradients(seed), kept, PARAMS)
        updates, given = donating(gradients(seed), given, PARAMS)
    same(updates, expected)
    same(given, kept)


def test_a_part_of_the_parameters(transform):
    """masked and partition hand over trees with holes: the part moves as if it were alone."""
    mask = {"embedding": False, "layers": {"up": True, "norm": {"scale": False}}, "down": True, "bias": False}
    part = {"layers": {"up": PARAMS["layers"]["up"]}, "down": PARAMS["down"]}

    def of_part(tree):
        return {"layers": {"up": tree["layers"]["up"]}, "down": tree["down"]}

    labels = jax.tree.map(lambda chosen: "ours" if chosen else "rest", mask)
    masked, alone = optax.masked(transform, mask), transform
    split = optax.partition({"ours": transform, "rest": optax.sgd(0.1)}, labels)
    states = [t.init(p) for t, p in ((masked, PARAMS), (split, PARAMS), (alone, part))]
    for seed in range(3):
        grads = gradients(seed)
        by_mask, states[0] = jax.jit(masked.update)(grads, states[0], PARAMS)
        by_label, states[1] = jax.jit(split.update)(grads, states[1], PARAMS)
        expected, states[2] = jax.jit(alone.update)(of_part(grads), states[2], part)
        same(of_part(by_mask), expected)
        same(of_part(by_label), expected)
        same(by_mask["bias"], grads["bias"])
        same(by_label["bias"], -0.1 * grads["bias"])


def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(transform):
    optimizer = optax.apply_if_finite(transform, 3)
    state, plain = optimizer.init(PARAMS), transform.init(PARAMS)
    for seed in range(3):
        if seed == 1:
            broken = gradients(9) | {"down": jnp.full((16, 8), jnp.nan)}
            updates, state = jax.jit(optimizer.update)(broken, state, PARAMS)
            assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
        updates, state = jax.jit(optimizer.update)(gradients(seed), state, PARAMS)
        expected, plain = jax.jit(transform.update)(gradients(seed), plain, PARAMS)
        same(updates, expected)
    same(state.inner_state, plain)


def test_accumulated_over_micro_steps(transform):
    """MultiSteps hands over the mean of two gradients every second time."""
    optimizer = optax.MultiSteps(transform, 2)
    state, plain = optimizer.init(PARAMS), transform.init(PARAMS)
    for seed in range(0, 6, 2):
        first, state = jax.jit(optimizer.update)(gradients(seed), state, PARAMS)
        assert all(not leaf.any() for leaf in jax.tree.leaves(first))
        updates, state = jax.jit(optimizer.update)(gradients(seed + 1), state, PARAMS)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, gradients(seed), gradients(seed + 1))
        expected, plain = jax.jit(transform.update)(mean, plain, PARAMS)
        same(updates, expected)


def test_map_params_sees_what_is_laid_out_like_the_parameters(transform):
    state = transform.init(PARAMS)
    mapped = optax.tree.map_params(
        transform, lambda leaf, param: jnp.zeros_like(leaf), state, PARAMS,
        transform_non_params=lambda part: part,
    )  # fmt: skip
    assert kinds(mapped) == kinds(state)


STATIC = ("rank", "every", "steps", "refresh", "inner", "score_fn", "iterations", "fraction")
INJECTED = {
    "track": (transforms.track_subspace, dict(rank=2, every=1)),
    "scale": (transforms.allocate_modules, dict(steps=2, mode="scale")),
    "project": (transforms.project_to_subspace, dict(inner=optax.trace(0.9), rank=2, refresh=2)),
    "extrapolate": (transforms.extrapolate, dict(score_fn=score)),
}


@pytest.mark.parametrize("name", INJECTED)
def test_injected_hyperparameters(name):
    """Ranks and counts are static, all other numbers may be arrays in the state."""
    factory, arguments = INJECTED[name]
    static = [argument for argument in STATIC if argument in inspect.signature(factory).parameters]
    injected = optax.inject_hyperparams(factory, static_args=static)(**arguments)
    same(steps(injected)[0], steps(factory(**arguments))[0])


def test_in_an_nnx_optimizer_on_a_mesh(transform):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    class Model(nnx.Module):
        def __init__(self):
            value = jax.device_put(jnp.ones((16, 8)), NamedSharding(mesh, P("fsdp", "tensor")))
            self.up = nnx.Param(value, out_sharding=("fsdp", "tensor"))
            self.scale = nnx.Param(jnp.ones(8))

    with jax.set_mesh(mesh):
        model = Model()
        optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), transform), wrt=nnx.Param)
        grads = jax.tree.map(lambda p: 0.01 * jnp.ones_like(p), nnx.state(model, nnx.Param))
        for _ in range(2):
            optimizer.update(model, grads)
    finite(nnx.state(model))


def test_types_on_an_explicit_mesh(transform):
    """Every leaf of the state keeps its sharding, weights sharded over both axes."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    specs = {
        "embedding": P("fsdp", "tensor"),
        "layers": {"up": P(None, "fsdp", "tensor"), "norm": {"scale": P()}},
        "down": P("tensor", "fsdp"),
        "bias": P(),
    }
    with jax.set_mesh(mesh):
        place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        params = jax.tree.map(place, PARAMS, specs)
        state = transform.init(params)
        before = jax.tree.map(jax.typeof, state)
        update = jax.jit(transform.update)
        for seed in range(2):
            grads = jax.tree.map(place, gradients(seed), specs)
            updates, state = update(grads, state, params)
        assert jax.tree.map(jax.typeof, state) == before
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
    alone, single = transform.init(PARAMS), None
    for seed in range(2):
        single, alone = jax.jit(transform.update)(gradients(seed), alone, PARAMS)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), atol=1e-3 * np.abs(np.asarray(b)).max() + 1e-7
        )
