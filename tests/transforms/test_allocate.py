"""allocate_modules against numpy, in a chain behind an optimiser."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax.transforms import (
    AllocateState,
    MatrixAxes,
    all_matrices,
    allocate_modules,
    frozen_modules,
    module_matrices,
    module_report,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {
    "embed": (5, 4),
    "layers": {"attention": {"q": (2, 4, 2, 3)}, "mlp": {"up": (2, 4, 6)}, "norm": {"scale": (2, 4)}},
    "lm_head": (4, 5),
}
AXES = {
    "embed": True,
    "layers": {
        "attention": {"q": MatrixAxes((1,), (2, 3))},
        "mlp": {"up": MatrixAxes()},
        "norm": {"scale": None},
    },
    "lm_head": None,
}
NAMES = ["embed", "layers.attention.q", "layers.mlp.up"]
WINDOW = 3


def make(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) * rng.uniform(0.1, 2.0), dtype),
        SHAPES,
        is_leaf=lambda x: type(x) is tuple,
    )


PARAMS, GRADS = make(0), [make(seed) for seed in range(1, 6)]


def stacks(tree):
    """The five matrices of a tree, in the order of the state: embed, q of 2 layers, up of 2 layers."""
    q, up = tree["layers"]["attention"]["q"], tree["layers"]["mlp"]["up"]
    return [np.asarray(x, np.float64) for x in (tree["embed"], q[0], q[1], up[0], up[1])]


@functools.cache
def trained(mode="report", measure="relative_update", accumulate="displacement", **options):
    """Updates that came out and states, of five steps of SGD; parameters move by what comes out."""
    tx = allocate_modules(WINDOW, mode, measure, accumulate=accumulate, matrices=AXES, **options)
    tx = optax.chain(optax.sgd(0.1), tx)
    update, params, state, out = jax.jit(tx.update), PARAMS, tx.init(PARAMS), []
    for grads in GRADS:
        updates, state = update(grads, state, params, grad=grads)
        params = optax.apply_updates(params, updates)
        out.append((updates, state[1]))
    return out


def flat(arrays):
    return np.concatenate([np.asarray(x) for x in arrays])


def expected(measure, accumulate="displacement"):
    moved = [[-0.1 * g for g in stacks(grads)] for grads in GRADS[:WINDOW]]
    sums = [np.linalg.norm(sum(u)) for u in zip(*moved, strict=True)]
    if accumulate == "path":
        sums = [np.sqrt(sum(np.sum(x**2) for x in u)) for u in zip(*moved, strict=True)]
    if measure == "relative_update":
        return np.minimum([d / np.linalg.norm(w) for d, w in zip(sums, stacks(PARAMS), strict=True)], 1.0)
    falls = [sum(0.1 * np.sum(g**2) for g in gs) for gs in zip(*map(stacks, GRADS[:WINDOW]), strict=True)]
    return np.array(falls) / sums


@pytest.mark.parametrize("accumulate", ["displacement", "path"])
@pytest.mark.parametrize("measure", ["relative_update", "loss_decrease"])
def test_measures(measure, accumulate):
    """As numpy has it after the window, and never changed later; updates pass as they came."""
    out = trained("report", measure, accumulate)
    wanted = expected(measure, accumulate)
    for _, state in out[WINDOW - 1 :]:
        np.testing.assert_allclose(flat(state.allocate_measures), wanted, rtol=2e-6)
        np.testing.assert_array_equal(flat(state.allocate_ranks), np.argsort(np.argsort(-wanted)))
        np.testing.assert_array_equal(flat(state.allocate_factors), 1)
    for (updates, _), grads in zip(out, GRADS, strict=True):
        jax.tree.map(np.testing.assert_array_equal, updates, jax.tree.map(lambda g: g * -0.1, grads))
    assert [int(s.allocate_count) for _, s in out] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("measure", ["relative_update", "loss_decrease"])
def test_scaling_keeps_the_mean(measure):
    """The documented formula; mean 1, monotone; what is not selected passes."""
    out = trained("scale", measure, power=2.0, limit=3.0)
    x = expected(measure)
    a = np.clip((x / x.mean()) ** 2.0, 1 / 3, 3)
    factors = flat(out[-1][1].allocate_factors)
    np.testing.assert_allclose(factors, a / a.mean(), rtol=1e-5)
    np.testing.assert_allclose(factors.mean(), 1, rtol=1e-6)
    assert (np.diff(factors[np.argsort(x)]) >= 0).all() and factors.max() > factors.min()
    for i, (updates, _) in enumerate(out):
        now = factors if i >= WINDOW else np.ones(5)
        for u, g, f in zip(stacks(updates), stacks(GRADS[i]), now, strict=True):
            np.testing.assert_allclose(u, -0.1 * g * f, rtol=1e-5)
        np.testing.assert_allclose(updates["lm_head"], -0.1 * GRADS[i]["lm_head"], rtol=1e-6)
        norms = [tree["layers"]["norm"]["scale"] for tree in (updates, GRADS[i])]
        np.testing.assert_allclose(norms[0], -0.1 * norms[1], rtol=1e-6)


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 2), (0.0, 0), (0.99, 4), (0.6, 3)])
def test_freezing(fraction, count):
    """Exactly zero updates of the lowest, from the step after the window; the rest bit for bit."""
    out = trained("freeze", fraction=fraction)
    frozen = np.argsort(expected("relative_update"))[:count]
    plain = trained()
    for i, ((updates, _), (raw, _)) in enumerate(zip(out, plain, strict=True)):
        for j, (u, r) in enumerate(zip(stacks(updates), stacks(raw), strict=True)):
            np.testing.assert_array_equal(u, np.zeros_like(r) if i >= WINDOW and j in frozen else r)
        for name in ("lm_head",):
            np.testing.assert_array_equal(updates[name], raw[name])
        np.testing.assert_array_equal(updates["layers"]["norm"]["scale"], raw["layers"]["norm"]["scale"])


def test_a_frozen_update_that_is_not_finite():
    tx = allocate_modules(1, "freeze", fraction=0.5)
    params = {"up": jnp.ones((2, 2)), "down": jnp.ones((2, 2))}
    _, state = tx.update({"up": jnp.ones((2, 2)), "down": 2 * jnp.ones((2, 2))}, tx.init(params), params)
    updates, _ = tx.update({"up": jnp.full((2, 2), jnp.nan), "down": params["down"]}, state, params)
    np.testing.assert_array_equal(updates["up"], 0)
    np.testing.assert_array_equal(updates["down"], 1)


def test_names():
    """Of layers of a stack; a trainer gets booleans, a logger scalars, from the state of a whole chain."""
    tx = optax.chain(optax.sgd(0.1), allocate_modules(WINDOW, "freeze", matrices=AXES))
    state = trained("freeze")[-1][1]
    opt_state = (tx.init(PARAMS)[0], state)
    found = frozen_modules(opt_state, PARAMS, AXES)
    assert list(found) == NAMES
    assert [x.tolist() for x in found.values()] == [(x == 0).tolist() for x in state.allocate_factors]
    assert sum(x.sum() for x in found.values()) == 2

    report = jax.jit(lambda s: module_report(s, PARAMS, AXES, prefix="m"))(opt_state)
    names = ["embed", *(f"{name}[{i}]" for name in NAMES[1:] for i in range(2))]
    parts = {f"m/{name}/{what}" for name in names for what in ("measure", "rank", "factor")}
    assert set(report) == parts | {"m/steps", "m/frozen"}
    assert all(x.dtype == jnp.float32 and x.shape == () for x in report.values())
    assert report["m/steps"] == 5
    assert report["m/layers.mlp.up[1]/measure"] == state.allocate_measures[2][1]
    sizes = np.repeat([20, 24, 24], [1, 2, 2])
    np.testing.assert_allclose(report["m/frozen"], sizes[flat(state.allocate_factors) == 0].sum() / 116)
    assert not any(x.any() for x in frozen_modules(tx.init(PARAMS), PARAMS, AXES).values())


def test_default_selection():
    """Attention, MLP, blocks of other names and the input embedding; stacked norms and biases are vectors."""
    params = {
        "model": {"embed_tokens": jnp.ones((5, 4)), "wpe": jnp.ones((5, 4))},
        "lm_head": {"kernel": jnp.ones((4, 5))},
        "layers": {
            "q_proj": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.ones((2, 4))},
            "input_layernorm": {"scale": jnp.ones((2, 4))},
            "mixer": {"kernel": jnp.ones((4, 4))},
        },
    }
    state = allocate_modules(1, "freeze").init(params)
    assert list(frozen_modules(state, params)) == [
        "layers.mixer.kernel",
        "layers.q_proj.kernel",
        "model.embed_tokens",
        "model.wpe",
    ]
    marks = module_matrices(params)
    assert marks["lm_head"]["kernel"] is None and marks["layers"]["q_proj"]["bias"] is None


def test_edges_of_the_measure():
    """No update: 0. From zero: 1. A loss that grows: negative, the least factor. All 0: factors of 1."""
    tx = allocate_modules(1, "scale", limit=2.0)
    params = {"k": jnp.ones((2, 2)), "q": jnp.zeros((2, 2)), "v": jnp.ones((2, 2))}
    updates = {"k": jnp.zeros((2, 2)), "q": jnp.ones((2, 2)), "v": jnp.full((2, 2), -0.5)}
    _, state = tx.update(updates, tx.init(params), params)
    np.testing.assert_allclose(flat(state.allocate_measures), [0, 1, 0.5])
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_array_equal(flat(state.allocate_factors), 1)

    tx = allocate_modules(1, "scale", "loss_decrease", limit=2.0)
    _, state = tx.update(updates, tx.init(params), grad=params)
    np.testing.assert_allclose(flat(state.allocate_measures), [0, 0, 2])
    _, state = tx.update(updates, tx.init(params), grad=jax.tree.map(jnp.ones_like, params))
    np.testing.assert_allclose(flat(state.allocate_measures), [0, -2, 2])
    np.testing.assert_allclose(flat(state.allocate_factors), np.array([0.5, 0.5, 3**0.5]) / (1 + 3**0.5) * 3)


def test_bfloat16():
    params, grads = make(0, jnp.bfloat16), make(1, jnp.bfloat16)
    tx = allocate_modules(1, "scale", matrices=AXES, displacement_dtype="bfloat16")
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    wide = [np.linalg.norm(g) / np.linalg.norm(w) for g, w in zip(stacks(grads), stacks(params), strict=True)]
    np.testing.assert_allclose(flat(state.allocate_measures), np.minimum(wide, 1), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, updates, grads)
    assert {x.dtype for x in jax.tree.leaves(state.allocate_displacement)} == {jnp.dtype("bfloat16")}
    updates, _ = jax.jit(tx.update)(grads, state, params)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}


def test_explicit_mesh():
    """Types of the state and of the updates are kept, and values are those without a mesh."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    specs = {
        "embed": jax.P(None, "fsdp"),
        "layers": {
            "attention": {"q": jax.P(None, "fsdp", "tensor")},
            "mlp": {"up": jax.P("tensor", "fsdp")},
            "norm": {"scale": jax.P()},
        },
        "lm_head": jax.P("fsdp"),
    }
    tx = allocate_modules(1, "scale", "loss_decrease", matrices=AXES)
    step = jax.jit(lambda g, s, p: tx.update(updates=g, state=s, params=p, grad=g))
    _, state = step(GRADS[0], tx.init(PARAMS), PARAMS)
    expected, expected_state = step(GRADS[1], state, PARAMS)
    with jax.set_mesh(mesh):
        params, *grads = (
            jax.tree.map(lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), tree, specs)
            for tree in (PARAMS, *GRADS[:2])
        )
        state = tx.init(params)
        _, after = step(grads[0], state, params)
        updates, last = step(grads[1], after, params)
        assert jax.tree.map(jax.typeof, last) == jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
    for tree, other in ((updates, expected), (last, expected_state)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), tree, other)


def test_scan_donation_and_no_recompilation(compilations):
    tx = allocate_modules(2, "freeze", matrices=AXES)
    out = trained("freeze")
    grads = jax.tree.map(lambda *x: jnp.stack(x), *GRADS)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda x: -0.1 * x, g), state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, carry, grads)

    shapes = jax.eval_shape(tx.init, PARAMS)
    state = jax.jit(tx.init)(PARAMS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    carry = (jax.tree.map(jnp.copy, PARAMS), state)
    (_, state), updates = run(carry)
    assert all(x.is_deleted() for x in jax.tree.leaves(carry))
    assert frozen_modules(state, PARAMS, AXES) is not None and state.allocate_count == 5
    np.testing.assert_allclose(updates["lm_head"][0], out[0][0]["lm_head"], rtol=1e-6)

    step = jax.jit(tx.update)
    state = jax.jit(tx.init)(PARAMS)
    _, state = step(GRADS[0], state, PARAMS)
    with compilations() as compiled:
        for g in GRADS[1:]:
            _, state = step(g, state, PARAMS)
    assert not compiled


def test_with_optax():
    """map_params sees the displacement; masked, partition and inject_hyperparams pass."""
    tx = allocate_modules(2, matrices=AXES)
    mapped = optax.tree.map_params(
        tx, lambda x, p: p, tx.init(PARAMS), PARAMS, transform_non_params=lambda _: None
    )
    assert isinstance(mapped, AllocateState) and mapped.allocate_factors is None
    jax.tree.map(np.testing.assert_array_equal, mapped.allocate_displacement, PARAMS)

    labels = {"embed": "rest", "layers": "blocks", "lm_head": "none"}
    split = optax.partition(
        {
            "blocks": allocate_modules(1, "freeze", fraction=0.3),
            "rest": optax.sgd(1.0),
            "none": optax.set_to_zero(),
        },
        labels,
    )
    updates, state = split.update(GRADS[0], split.init(PARAMS), PARAMS)
    updates, state = split.update(GRADS[0], state, PARAMS)
    np.testing.assert_array_equal(updates["embed"], -GRADS[0]["embed"])
    masked = jax.tree.map(lambda _: optax.MaskedNode(), PARAMS) | {"layers": PARAMS["layers"]}
    # q is a stack of 2 x 4 here, up one of 2: 3 of the 10 matrices.
    assert sum(int(x.sum()) for x in frozen_modules(state, masked).values()) == 3

    injected = optax.inject_hyperparams(allocate_modules, static_args=("matrices",))(
        steps=1, mode="freeze", fraction=0.4, matrices=AXES
    )
    state = injected.init(PARAMS)
    updates, state = injected.update(GRADS[0], state, PARAMS)
    updates, state = injected.update(GRADS[0], state, PARAMS)
    assert sum(int(x.sum()) for x in frozen_modules(state, PARAMS, AXES).values()) == 2

    empty = allocate_modules(2)
    assert jax.tree.leaves(empty.update({}, empty.init({}), {})[0]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(steps=0), "steps must be an int >= 1, got 0"),
        (dict(steps=1.5), "steps must be an int"),
        (dict(mode="skip"), "mode must be 'report' or 'scale' or 'freeze', got 'skip'"),
        (dict(measure="norm"), "measure must be"),
        (dict(accumulate="no"), "accumulate must be"),
        (dict(fraction=1.0), r"fraction must be in \[0, 1\), got 1.0"),
        (dict(power=-1.0), "power must be"),
        (dict(limit=0.5), "limit must be"),
        (dict(displacement_dtype="int32"), "displacement_dtype must be floating"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate_modules(**dict(steps=2) | arguments)


def test_bad_trees():
    params = {"up": jnp.ones((2, 2)), "bias": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="no matrix is selected"):
        allocate_modules(2).init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="norms and biases are never frozen; deselect bias"):
        allocate_modules(2, "freeze", matrices={"up": True, "bias": True}).init(params)
    tx = allocate_modules(2)
    state = tx.init(params)
    with pytest.raises(ValueError, match="its measure needs `params`"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="params is no tree like the updates"):
        tx.update(params, state, {"up": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="extra argument `grad`"):
        allocate_modules(2, measure="loss_decrease").update(params, state, params)
    more = params | {"down": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"other parameters.*selected are down \(1, 2, 2\), up"):
        jax.jit(tx.update)(more, state, more)
    with pytest.raises(ValueError, match="0 states of allocate_modules"):
        frozen_modules(optax.sgd(1.0).init(params), params)
    with pytest.raises(ValueError, match="2 states of allocate_modules"):
        module_report((state, state), params)
    with pytest.raises(ValueError, match="other parameters"):
        module_report(state, params, all_matrices(more) and {"up": True, "bias": True})
