"""project_to_subspace against numpy, unprojected optimisers and optax.contrib.galore."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from opd_jax.transforms import MatrixAxes, ProjectState, project_to_subspace

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {"blocks": {"up": (2, 8, 8), "q": (8, 2, 4)}, "norm": {"scale": (2, 8)}, "embed": (6, 4)}
AXES = {"blocks": {"up": MatrixAxes(), "q": MatrixAxes((0,), (1, 2))}, "norm": {"scale": None}, "embed": None}


def one(tree):
    """`matrices` of tests that need one projected leaf only: it compiles in half the time."""
    return jax.tree.map(lambda leaf: leaf.shape == SHAPES["blocks"]["up"], tree)


def make(seed, shapes=SHAPES, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), shapes, is_leaf=lambda x: type(x) is tuple
    )


PARAMS, GRADS = make(0), [make(seed) for seed in range(1, 7)]


def run(tx, grads, params=None):
    """Updates and states of all steps, the parameters held."""
    state, update, out = tx.init(grads[0] if params is None else params), jax.jit(tx.update), []
    for g in grads:
        updates, state = update(g, state, params)
        out.append((updates, state))
    return out


def assert_close(tree, other, atol=1e-5, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), tree, other)


@pytest.mark.parametrize("sides", ["auto", "both"])
def test_full_rank_is_a_rotation(sides):
    """With a linear inner optimiser nothing changes, whatever the basis is and how often it is made anew."""
    inner = optax.sgd(0.3, momentum=0.8, nesterov=True)
    tx = project_to_subspace(inner, 8, sides=sides, refresh=1, matrices=AXES)
    for (updates, state), (plain, _) in zip(run(tx, GRADS), run(inner, GRADS), strict=True):
        assert_close(updates, plain)
        np.testing.assert_allclose(np.concatenate(state.project_energy), 1, rtol=1e-5)
    assert state.project_refreshes == len(GRADS)
    assert abs(state.project_inner[0].trace["blocks"]["up"] - make(1)["blocks"]["up"]).max() > 0.1


def tilted(angle):
    """[2, 3] of rank 1 with the left singular vector (cos, sin)."""
    return {"up": jnp.outer(jnp.array([np.cos(angle), np.sin(angle)]), jnp.array([2.0, 1.0, -2.0]))}


def test_transport_by_hand():
    """Rank 1: the basis turns by 60 degrees, R = 1/2, so that the first moment halves.

    Both gradients have the coordinates c = +-(2, 1, -2). After two steps momentum is c + 0.5 * c / 2; RMS
    keeps all of the second moment: (1 - 0.75) c^2 + 0.75 * 0.25 c^2.
    """
    grads, c = [tilted(0.0), tilted(np.pi / 3)], np.array([2.0, 1.0, -2.0])
    tx = project_to_subspace(optax.trace(0.5), 1, sides="left", refresh=1)
    updates, state = run(tx, grads)[-1]
    u = np.array([np.cos(np.pi / 3), np.sin(np.pi / 3)])
    np.testing.assert_allclose(updates["up"], np.outer(u, 1.25 * c), atol=1e-5)
    np.testing.assert_allclose(abs(state.project_left[0][0, :, 0]), u, atol=1e-5)
    np.testing.assert_allclose(state.project_overlap, 0.25, atol=1e-5)
    tx = project_to_subspace(optax.scale_by_rms(0.75, eps=0.0), 1, sides="left", refresh=1)
    updates, state = run(tx, grads)[-1]
    np.testing.assert_allclose(state.project_inner.nu["up"], [0.4375 * c**2], rtol=1e-5)
    np.testing.assert_allclose(updates["up"], np.outer(u, np.sign(c) / 0.4375**0.5), atol=1e-5)


def moved(x, turn, squares):
    """A moment [k, n] by the documented rule, in float64."""
    if not squares:
        return turn @ x
    weights = turn**2
    return weights @ x + (1 - weights.sum(1, keepdims=True)) * x.mean(0, keepdims=True)


@pytest.mark.parametrize("sides", ["left", "right", "both"])
def test_adam_against_numpy(sides):
    """Adam in coordinates with moments carried over, given the bases that were found."""
    tx = project_to_subspace(
        optax.scale_by_adam(0.9, 0.99, eps=1e-6), 3, sides=sides, refresh=2, matrices=AXES
    )
    mu = nu = old = None
    for t, (grads, (updates, state)) in enumerate(zip(GRADS, run(tx, GRADS), strict=True), 1):
        g = np.asarray(grads["blocks"]["q"], np.float64).reshape(8, 8)
        bases = [np.asarray(b[0][0], np.float64) for b in (state.project_left, state.project_right) if b]
        u = bases[0] if sides != "right" else np.eye(8)
        v = bases[-1] if sides != "left" else np.eye(8)
        np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-5)
        c = u.T @ g @ v
        if old is None:
            mu, nu = np.zeros_like(c), np.zeros_like(c)
        elif t % 2:
            for turn, flip in ((u.T @ old[0], False), (v.T @ old[1], True)):
                mu, nu = (x.T if flip else x for x in (mu, nu))
                mu, nu = moved(mu, turn, False), moved(nu, turn, True)
                mu, nu = (x.T if flip else x for x in (mu, nu))
        else:
            np.testing.assert_array_equal(u, old[0])
        old = u, v
        mu, nu = 0.9 * mu + 0.1 * c, 0.99 * nu + 0.01 * c**2
        step = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.99**t)) + 1e-6)
        np.testing.assert_allclose(updates["blocks"]["q"].reshape(8, 8), u @ step @ v.T, atol=2e-4)
        np.testing.assert_allclose(state.project_energy[0], (c**2).sum() / (g**2).sum(), rtol=1e-4)
    plain = run(optax.scale_by_adam(0.9, 0.99, eps=1e-6), GRADS)[-1][0]
    assert_close((updates["embed"], updates["norm"]), (plain["embed"], plain["norm"]))


@pytest.mark.slow
def test_the_basis_is_that_of_the_svd():
    """One stack, several spectra; also unstacked layers, which are iterated together, and 1 x n."""
    rng = np.random.default_rng(3)
    q = [np.linalg.qr(rng.normal(size=(3, n, n)))[0] for n in (12, 6)]
    scales = np.array([[8, 5, 0.1, 0.05, 0.01, 0], [1, 1, 0, 0, 0, 0], [3, 2, 0.2, 0.1, 0.1, 0.1]])
    stack = jnp.asarray(np.einsum("lmi,li,lni->lmn", q[0][:, :, :6], scales, q[1]), jnp.float32)
    tree = {"up": stack, "layers": [{"up": x} for x in stack], "row": jnp.ones((1, 6))}
    tx = project_to_subspace(optax.identity(), 2, matrices=jax.tree.map(lambda _: True, tree))
    with pytest.warns(UserWarning, match=r"row \(1 x 6\); they take what they have"):
        tx.init(tree)
    with pytest.warns(UserWarning, match="rank 2 is more than"):
        updates, state = run(tx, [tree])[-1]
    wanted = np.einsum("lmi,li,lni->lmn", q[0][:, :, :2], scales[:, :2], q[1][:, :, :2])
    np.testing.assert_allclose(updates["up"], wanted, atol=2e-3)
    np.testing.assert_allclose(jnp.stack([x["up"] for x in updates["layers"]]), updates["up"], atol=2e-3)
    np.testing.assert_allclose(updates["row"], tree["row"], rtol=1e-5)
    energy = (scales[:, :2] ** 2).sum(1) / (scales**2).sum(1)
    assert len(state.project_energy) == 5
    np.testing.assert_allclose(np.concatenate(state.project_energy), [*energy, 1, *energy], rtol=1e-4)


@pytest.mark.parametrize("sides", ["auto", "both"])
def test_error_feedback_loses_nothing(sides):
    """SGD: what was applied and the residual are all gradients; without it the rest is gone."""
    total = jax.tree.map(lambda *g: sum(g), *GRADS)
    tx = project_to_subspace(
        optax.sgd(1.0), 2, sides=sides, refresh=2, residual="error_feedback", matrices=one
    )
    out = run(tx, GRADS)
    applied = jax.tree.map(lambda *u: sum(u), *[u for u, _ in out])
    residual = out[-1][1].project_residual
    assert_close(jax.tree.map(lambda r, a: r - a, residual, applied), total)
    np.testing.assert_array_equal(residual["embed"], 0)
    assert abs(residual["blocks"]["up"]).max() > 0.1

    if sides == "both":
        return
    dropped = run(project_to_subspace(optax.sgd(1.0), 2, sides=sides, refresh=2, matrices=one), GRADS)
    assert dropped[-1][1].project_residual == ()
    assert_close(dropped[0][0], out[0][0], atol=1e-4)
    inside = sum(jnp.vdot(u["blocks"]["up"], u["blocks"]["up"]) for u, _ in dropped)
    assert 0 < inside < 0.8 * sum(jnp.vdot(g["blocks"]["up"], g["blocks"]["up"]) for g in GRADS)


def constant(angle, number):
    return [tilted(angle)] * number


def test_refreshing_on_drift():
    """The gradient turns by 30 degrees: cos^2 = 3/4 of the energy stays, 1/4 is lost, above 0.2 of it."""
    tx = project_to_subspace(optax.sgd(1.0), 1, sides="left", refresh=100, drift=0.2)
    states = [s for _, s in run(tx, constant(0.0, 3) + constant(np.pi / 6, 3))]
    np.testing.assert_allclose([s.project_drift for s in states], [0, 0, 0, 0.25, 0, 0], atol=1e-5)
    assert [int(s.project_refreshed) for s in states] == [0, 0, 0, 0, 4, 4]
    np.testing.assert_allclose(states[3].project_energy[0], 0.75, atol=1e-5)
    np.testing.assert_allclose(states[4].project_energy[0], 1, atol=1e-5)
    tx = project_to_subspace(optax.sgd(1.0), 1, sides="left", refresh=100, drift=0.3)
    states = [s for _, s in run(tx, constant(0.0, 3) + constant(np.pi / 6, 3))]
    assert states[-1].project_refreshes == 1


def test_lock_in():
    """cos^2 of 30 degrees is 3/4: above 0.7, so that the second such refresh in a row is the last."""
    tx = project_to_subspace(optax.sgd(1.0), 1, sides="left", refresh=1, stop_after_lock_in=0.7)
    angles = np.array([0, 60, 90, 150, 180, 210, 300, 0]) * np.pi / 180
    states = [s for _, s in run(tx, [tilted(a) for a in angles])]
    assert [int(s.project_streak) for s in states] == [0, 0, 1, 0, 1, 2, 2, 2]
    assert [int(s.project_locked) for s in states] == [-1] * 5 + [5] * 3
    assert states[-1].project_refreshes == 6
    np.testing.assert_array_equal(states[-1].project_left[0], states[5].project_left[0])


def test_a_first_gradient_of_zero():
    """There is no subspace in it; the next update looks again. Zero gradients give zeros, never NaN."""
    tx = project_to_subspace(optax.scale_by_adam(), 1, sides="left", refresh=100)
    zero = {"up": jnp.zeros((2, 3))}
    (first, early), (second, late), (_, last) = run(tx, [zero, tilted(0.3), tilted(0.3)])
    np.testing.assert_array_equal(first["up"], 0)
    assert early.project_energy[0] == 0 and late.project_refreshed == 1 and last.project_refreshed == 1
    np.testing.assert_allclose(late.project_energy[0], 1, rtol=1e-5)
    assert np.isfinite(second["up"]).all() and jnp.vdot(second["up"], tilted(0.3)["up"]) > 0


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("sides", "moments", "bases"),
    [("auto", 16 * 64, 16 * 256), ("right", 256 * 16, 16 * 64), ("both", 16 * 16, 16 * (64 + 256))],
)
def test_memory(sides, moments, bases):
    """Of 3 layers [256, 64] at rank 16: Adam's moments are 1/16 of 256 x 64 from the longer side."""
    params = {"layers": {"up": jax.ShapeDtypeStruct((3, 256, 64), jnp.bfloat16)}}
    tx = project_to_subspace(optax.scale_by_adam(), 16, sides=sides)
    state = jax.eval_shape(tx.init, params)
    assert size(state.project_inner) == 2 * 3 * moments + 1
    assert size((state.project_left, state.project_right)) == 3 * bases
    full = size(jax.eval_shape(optax.scale_by_adam().init, params))
    if sides == "auto":
        assert (size(state.project_inner) - 1) / (full - 1) == 16 / 256  # beside the count
        assert size(state) < full / 5


def primitives(jaxpr):
    """Names and operand shapes of all operations of a program, those inside others, too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, [v.aval.shape for v in equation.invars]
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


@pytest.mark.parametrize("sides", ["auto", "both"])
def test_nothing_large_is_decomposed(sides):
    """Factorisations are of k x k, or solve with it: there is no SVD; galore has one of the gradient."""
    known = {
        "svd",
        "eigh",
        "qr",
        "geqrf",
        "householder_product",
        "cholesky",
        "schur",
        "hessenberg",
        "lu",
        "eig",
    }
    params = {"up": jax.ShapeDtypeStruct((3, 24, 20), jnp.float32)}

    def found(tx, params):
        state = jax.eval_shape(tx.init, params)
        program = jax.make_jaxpr(tx.update)(params, state, params)
        return [(name, shapes[0]) for name, shapes in primitives(program.jaxpr) if name in known]

    ours = found(project_to_subspace(optax.adamw(1.0), 4, sides=sides), params)
    assert ours and all(max(shape[-2:]) <= 4 for _, shape in ours)
    assert not any(name in ("svd", "schur", "eig") for name, _ in ours)
    theirs = found(optax.contrib.galore(1.0, 4), {"up": jax.ShapeDtypeStruct((24, 20), jnp.float32)})
    assert ("svd", (24, 20)) in theirs


def test_as_galore_and_adam():
    """Regression from 4 examples: gradients X^T (X W - Y) have rank 4, and all reach the same low loss."""
    rng = np.random.default_rng(5)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 24), (4, 10)))

    def loss(params):
        return jnp.mean((x @ params["up"] - y) ** 2) / 2

    def trained(tx, steps=150):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        params = {"up": jnp.zeros((24, 10))}
        return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=steps)[1])()

    adam = trained(optax.adam(0.02))
    galore = trained(optax.contrib.galore(0.02, rank=4, update_proj_gap=20))
    ours = trained(project_to_subspace(optax.adam(0.02), 4, refresh=20))
    assert adam[0] == galore[0] == ours[0] > 0.3
    for losses in (adam, galore, ours):
        assert losses[-1] < 1e-3 * losses[0]
    fewer = trained(project_to_subspace(optax.adam(0.02), 3, refresh=200))  # one direction is missing
    assert fewer[-1] > 0.05 * fewer[0]


def test_parameters_in_coordinates():
    """adamw inside decays the part of W in the subspace, where its mask says so by name; extra args pass."""
    mask = lambda params: {"blocks": {"up": True, "q": False}, "norm": {"scale": False}, "embed": True}  # noqa: E731
    tx = project_to_subspace(optax.add_decayed_weights(0.1, mask), 2, sides="left", matrices=AXES, scale=3.0)
    ((updates, state),) = run(tx, GRADS[:1], PARAMS)
    u = [np.asarray(b, np.float64) for b in state.project_left]
    up, w = GRADS[0]["blocks"]["up"], PARAMS["blocks"]["up"]
    wanted = 3 * np.einsum("lmk,lik,lin->lmn", u[1], u[1], up + 0.1 * w)
    np.testing.assert_allclose(updates["blocks"]["up"], wanted, atol=1e-4)
    q = np.einsum("mk,ik,inh->mnh", u[0][0], u[0][0], GRADS[0]["blocks"]["q"])
    np.testing.assert_allclose(updates["blocks"]["q"], 3 * q, atol=1e-4)
    assert_close(updates["embed"], GRADS[0]["embed"] + 0.1 * PARAMS["embed"])

    def update(updates, state, params=None, *, factor, **extra_args):
        assert extra_args == {"other": None} and params is None
        assert updates["blocks"]["q"].shape == (2, 2, 4) and updates["blocks"]["up"].shape == (2, 2, 8)
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    tx = project_to_subspace(inner, 2, sides="left", matrices=AXES, scale=3.0)
    twice, _ = tx.update(updates=GRADS[0], state=tx.init(PARAMS), factor=2.0, other=None)
    assert_close(twice["blocks"]["q"], 6 * q, atol=1e-4)
    assert_close(twice["embed"], 2 * GRADS[0]["embed"])


def test_bfloat16():
    tx = project_to_subspace(
        optax.scale_by_adam(),
        2,
        matrices=one,
        residual="error_feedback",
        residual_dtype="bfloat16",
        refresh=2,
    )
    grads = [make(seed, dtype=jnp.bfloat16) for seed in range(1, 4)]
    for updates, state in run(tx, grads, make(0, dtype=jnp.bfloat16)):
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
        assert {x.dtype for x in jax.tree.leaves(state.project_residual)} == {jnp.dtype("bfloat16")}
    assert state.project_inner.mu["blocks"]["up"].dtype == jnp.float32
    assert state.project_inner.mu["embed"].dtype == jnp.bfloat16
    assert all(np.isfinite(x.astype(jnp.float32)).all() for x in jax.tree.leaves((updates, state)))


SPECS = {
    "blocks": {"up": jax.P(None, "fsdp", "tensor"), "q": jax.P("fsdp", "tensor")},
    "norm": {"scale": jax.P()},
    "embed": jax.P("tensor"),
}


def test_explicit_mesh():
    """Types of the state and of the updates are kept; moments lie as parameters; values as without a mesh."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    axes = AXES | {"blocks": AXES["blocks"] | {"up": None}}
    tx = project_to_subspace(
        optax.adamw(0.1), 4, sides="both", refresh=2, residual="error_feedback", drift=0.5, matrices=axes
    )
    expected, expected_state = run(tx, GRADS[:3], PARAMS)[-1]
    with jax.set_mesh(mesh):
        params, *grads = (
            jax.tree.map(lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), tree, SPECS)
            for tree in (PARAMS, *GRADS[:3])
        )
        start = tx.init(params)
        updates, state = run(tx, grads, params)[-1]
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, start)
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
    mu = state.project_inner[0].mu
    assert jax.typeof(mu["blocks"]["q"]).sharding.spec == jax.P("fsdp", "tensor", None)
    assert jax.typeof(mu["blocks"]["q"]).shape == (4, 4, 1)
    assert jax.typeof(state.project_left[0]).sharding.spec == jax.P(None, "fsdp", None)
    assert_close(state.project_energy, expected_state.project_energy, rtol=1e-3)
    assert_close(updates, expected, atol=1e-3)


def test_explicit_axes_that_do_not_divide():
    """Rank 3 on 4 devices: that axis of the coordinates is left whole."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    tx = project_to_subspace(optax.sgd(1.0, 0.9), 3)
    with jax.set_mesh(mesh):
        grads = {
            "up": jax.device_put(
                GRADS[0]["blocks"]["up"], jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor"))
            )
        }
        state = tx.init(grads)
        _, after = jax.jit(tx.update)(grads, state)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert jax.typeof(after.project_inner[0].trace["up"]).sharding.spec == jax.P(None, None, "tensor")


@pytest.mark.parametrize("sides", ["left", "right"])
def test_no_matrix_is_gathered(sides):
    """Two kernels of one shape, laid out in opposite ways: only what has k rows or columns is sent about."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"q": jax.P(None, "fsdp", "tensor"), "o": jax.P(None, "tensor", "fsdp")}
    params = {
        name: jax.ShapeDtypeStruct((2, 64, 64), jnp.float32, sharding=jax.NamedSharding(mesh, spec))
        for name, spec in specs.items()
    }
    tx = project_to_subspace(optax.scale_by_adam(), 8, sides=sides, residual="error_feedback")
    whole = jax.NamedSharding(mesh, jax.P())
    shardings = optax.tree.map_params(
        tx,
        lambda _, p: p.sharding,
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda part: jax.tree.map(lambda _: whole, part),
    )
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        shardings,
    )
    out = (jax.tree.map(lambda p: p.sharding, params), shardings)
    text = jax.jit(tx.update, out_shardings=out).lower(params, state, params).compile().as_text()
    found = re.findall(r"= .*?f32\[([\d,]+)\].* (?:all-gather|all-reduce|all-to-all)(?:-start)?\(", text)
    shapes = [[int(n) for n in dims.split(",")] for dims in found]
    assert shapes and all(min(shape[-2:]) <= 8 for shape in shapes if len(shape) > 1)


@pytest.mark.parametrize("rank", [4, 3])
def test_auto_mesh_and_nnx_optimizer(rank):
    """Variables with sharding metadata; moments lie as their parameters do, if the axis divides k."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    grad = jnp.outer(jnp.arange(1.0, 9.0), jnp.array([1.0, -1.0, 2.0, 1.0]))
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
        model = nnx.Linear(8, 4, kernel_init=init, use_bias=False, rngs=nnx.Rngs(0))
        start = jnp.copy(model.kernel[...])
        tx = project_to_subspace(optax.sgd(0.1, momentum=0.5), rank, residual="error_feedback", refresh=1)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(lambda m: jnp.vdot(m.kernel[...], grad))(model))

        step(model, optimizer)
        step(model, optimizer)
    trace = optimizer.opt_state.project_inner[0].trace["kernel"][...]
    assert trace.shape == (rank, 4)
    assert model.kernel[...].sharding.spec == jax.P("fsdp", "tensor")
    if rank == 4:
        assert trace.sharding.spec == jax.P("fsdp", "tensor")
    np.testing.assert_allclose(model.kernel[...], start - 0.25 * grad, atol=1e-5)


def test_scan_donation_and_no_recompilation(compilations):
    tx = project_to_subspace(optax.adam(0.1), 2, refresh=2, matrices=one, drift=0.5, stop_after_lock_in=0.9)
    grads = jax.tree.map(lambda *x: jnp.stack(x), *GRADS)
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    init, step = jax.jit(tx.init), jax.jit(tx.update)
    state = init(PARAMS)
    assert described(state) == described(jax.eval_shape(tx.init, PARAMS)) == described(tx.init(PARAMS))

    @functools.partial(jax.jit, donate_argnums=0)
    def scanned(state):
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, grads)

    final, updates = scanned(init(PARAMS))
    donated = init(PARAMS)
    scanned(donated)
    assert all(x.is_deleted() for x in jax.tree.leaves(donated))

    out, state = step(GRADS[0], state)
    with compilations() as compiled:
        for g in GRADS[1:]:
            out, state = step(g, state)
    assert not compiled
    assert_close(out, jax.tree.map(lambda u: u[-1], updates), atol=1e-3)
    assert final.project_count == state.project_count == len(GRADS)


@pytest.mark.slow
def test_with_optax():
    """map_params lays moments out as parameters; wrappers outside and inside."""
    inner = optax.adam(0.1)
    tx = project_to_subspace(inner, 2, matrices=AXES, residual="error_feedback")
    state = tx.init(PARAMS)
    mapped = optax.tree.map_params(tx, lambda _, p: p, state, PARAMS, transform_non_params=lambda _: None)
    assert isinstance(mapped, ProjectState) and mapped.project_left is None
    for tree in (mapped.project_inner[0].mu, mapped.project_inner[0].nu, mapped.project_residual):
        jax.tree.map(np.testing.assert_array_equal, tree, PARAMS)

    options = dict(refresh=2, matrices=one)
    plain = project_to_subspace(inner, 2, **options)
    grads = GRADS[:3]
    expected = run(plain, grads)[-1][0]
    labels = {"blocks": "a", "norm": "b", "embed": "b"}
    for wrapped in (
        optax.partition({"a": plain, "b": inner}, labels),
        optax.chain(optax.identity(), optax.apply_if_finite(plain, 3)),
        optax.inject_hyperparams(project_to_subspace, static_args=("rank", "matrices"))(
            inner=inner, rank=2, scale=1.0, **options
        ),
        # As its inner optimiser: moments are found below other states, too.
        project_to_subspace(optax.chain(optax.masked(inner, True), optax.identity()), 2, **options),
        project_to_subspace(optax.inject_hyperparams(optax.adam)(0.1), 2, **options),
        project_to_subspace(optax.partition({"a": inner, "b": optax.adam(0.1)}, labels), 2, **options),
    ):
        assert_close(run(wrapped, grads)[-1][0], expected, atol=2e-4)

    empty = project_to_subspace(inner, 2)
    assert jax.tree.leaves(empty.update({}, empty.init({}))[0]) == []


def test_multi_steps():
    """Around it, one refresh for each accumulated gradient; inside, its sums are coordinates."""
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *GRADS[:2])
    tx = project_to_subspace(optax.sgd(1.0), 2, matrices=one)
    expected = run(tx, [mean])[-1][0]
    wrapped = optax.MultiSteps(tx, 2)
    state = wrapped.init(PARAMS)
    for g in GRADS[:2]:
        updates, state = jax.jit(wrapped.update)(g, state, PARAMS)
    assert_close(updates, expected, atol=1e-4)
    assert state.inner_opt_state.project_count == 1

    inner = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    tx = project_to_subspace(inner, 8, refresh=1, matrices=one)
    out = run(tx, GRADS[:2], PARAMS)
    assert_close(out[0][0], jax.tree.map(jnp.zeros_like, PARAMS))
    assert_close(out[1][0], jax.tree.map(jnp.negative, mean))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rank=0), "rank must be an int >= 1, got 0"),
        (dict(rank=jnp.array(2)), r"static_args=\('rank',\)"),
        (dict(sides="up"), "sides must be 'auto' or"),
        (dict(refresh=0), "refresh must be an int >= 1, got 0"),
        (dict(iterations=2.0), "iterations must be an int"),
        (dict(drift=0.0), r"drift must be in \(0, 1\]"),
        (dict(stop_after_lock_in=1.5), "stop_after_lock_in must be"),
        (dict(residual="keep"), "residual must be 'drop' or"),
        (dict(residual_dtype="int8"), "residual_dtype must be floating"),
        (dict(scale=float("nan")), "scale must be finite"),
        (dict(on_small="pad"), "on_small must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        project_to_subspace(optax.identity(), **dict(rank=2) | arguments)


def test_bad_trees():
    params = {"up": jnp.ones((4, 4))}
    tx = project_to_subspace(optax.identity(), 2)
    with pytest.raises(ValueError, match="no matrix is selected"):
        tx.init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"rank 8 is more than some matrices have: up \(4 x 4\)"):
        project_to_subspace(optax.identity(), 8, on_small="error").init(params)
    state = tx.init(params)
    more = params | {"down": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match=r"other parameters.*selected are down \(1, 4, 6\), up"):
        jax.jit(tx.update)(more, state)
    with pytest.raises(ValueError, match="parameters are no tree like the updates"):
        tx.update(params, state, more)
