"""track_subspace against numpy's SVD, a closed form, and hand-made sequences of updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax.transforms import MatrixAxes, subspace_summary, track_subspace

pytestmark = pytest.mark.usefixtures("quick_compilation")

PARAMS = {
    "embedding": jnp.ones((30, 8)),
    "layers": {
        "attention": {"q": {"kernel": jnp.ones((3, 8, 6))}},
        "mlp": {"up": {"kernel": jnp.ones((3, 8, 16))}},
        "norm": {"scale": jnp.ones((3, 8))},
    },
}


def random_updates(seed, params=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def run(transform, sequence, params=PARAMS):
    state, update = transform.init(params), jax.jit(transform.update)
    for updates in sequence:
        out, state = update(updates, state, params)
        jax.tree.map(np.testing.assert_array_equal, out, updates)  # it is an identity
    return state


def test_what_is_found_of_the_displacement():
    """Two updates whose sum is of rank 2: everything is exact, for each layer singly."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 8, 2)), rng.normal(size=(3, 2, 6))
    total = (a @ b).astype(np.float32)
    first = random_updates(1)
    rest = jax.tree.map(lambda p: -p, first)
    rest["layers"]["attention"]["q"]["kernel"] += total
    state = run(track_subspace(rank=4, every=1, of="displacement"), [first] + [rest] + [
        jax.tree.map(jnp.zeros_like, first)
    ] * 6)  # fmt: skip
    kept = state.track_displacement["layers"]["attention"]["q"]["kernel"]
    np.testing.assert_allclose(kept, total, atol=1e-5)
    assert state.track_displacement["embedding"].shape == ()  # not selected: nothing is kept
    found = subspace_summary(state, PARAMS, prefix="p/")
    s = np.linalg.svd(total.astype(np.float64), compute_uv=False)
    name = "p/layers.attention.q.kernel"
    norms = np.sqrt((s**2).sum(-1))
    np.testing.assert_allclose(found[f"{name}/spectral_norm"], s[:, 0].mean(), rtol=1e-4)
    np.testing.assert_allclose(found[f"{name}/spectral_ratio"], (s[:, 0] / norms).mean(), rtol=1e-4)
    np.testing.assert_allclose(found[f"{name}/energy"], 1, rtol=1e-5)
    p = s / s.sum(-1, keepdims=True)
    ranks = np.exp(-np.where(p > 1e-9, p * np.log(np.maximum(p, 1e-9)), 0).sum(-1))
    np.testing.assert_allclose(found[f"{name}/effective_rank"], ranks.mean(), rtol=2e-2)
    probe = state.track_probes[0]
    u = np.linalg.svd(total.astype(np.float64), full_matrices=False)[0][..., :2]
    np.testing.assert_allclose(np.abs(np.einsum("smi,smi->si", u, probe.left[..., :2])), 1, atol=1e-3)
    assert {"p/attention/energy", "p/mlp/energy", "p/all/energy", "p/lower_layers/energy"} < set(found)
    assert "p/embedding/energy" not in found


def test_probes_come_every_few_steps_and_say_when():
    state = run(track_subspace(rank=2, every=3), [random_updates(i) for i in range(5)])
    assert (int(state.track_count), int(state.track_step)) == (5, 4)  # probed after updates 1 and 4
    alone = run(track_subspace(rank=2, every=1), [random_updates(i) for i in (0, 3)])
    for a, b in zip(
        jax.tree.leaves(state.track_probes[1].values), [alone.track_probes[1].values], strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_lock_in_is_the_first_step_from_which_it_holds():
    """Directions that stay, turn once, and stay again."""
    rng = np.random.default_rng(2)
    one, other = (rng.normal(size=(1, 8, 1)) @ rng.normal(size=(1, 1, 6)) for _ in range(2))
    sequence = [{"w": jnp.asarray(m[0], jnp.float32)} for m in (one, one, one, other, other, other, other)]
    params = {"w": jnp.ones((8, 6))}
    transform = track_subspace(rank=1, every=1, lock_in=0.9)
    state, steps, overlaps = transform.init(params), [], []
    for updates in sequence:
        _, state = transform.update(updates, state, params)
        steps.append(int(state.track_probes[0].lock_in[0]))
        overlaps.append(float(state.track_probes[0].overlap[0]))
    assert steps == [-1, 2, 2, -1, 5, 5, 5]
    u, v = (np.linalg.svd(m[0])[0][:, 0] for m in (one, other))
    np.testing.assert_allclose(overlaps[3], (u @ v) ** 2, atol=1e-3)
    summary = subspace_summary(state, params)
    assert summary["lock_in"] == 5
    np.testing.assert_allclose(summary["w/first_overlap"], (u @ v) ** 2, atol=1e-3)


def test_zero_and_broken_updates_leave_the_bases_as_they_were():
    good = random_updates(0)
    transform = track_subspace(rank=2, every=1)
    state = run(transform, [good, good])
    for bad in (jnp.zeros_like, lambda p: jnp.full_like(p, jnp.nan)):
        _, after = transform.update(jax.tree.map(bad, good), state, PARAMS)
        for old, new in zip(state.track_probes, after.track_probes, strict=True):
            np.testing.assert_array_equal(old.left, new.left)
            np.testing.assert_array_equal(old.right, new.right)
    state = run(transform, [jax.tree.map(jnp.zeros_like, good), good])  # a warm-up that starts at 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_the_dtype_of_the_displacement():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    for dtype, expected in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
        transform = track_subspace(rank=2, of="displacement", displacement_dtype=dtype)
        state = run(transform, [random_updates(0, half)], half)
        assert state.track_displacement["layers"]["mlp"]["up"]["kernel"].dtype == expected


def test_attention_kernels_with_three_axes():
    params = {"kernel": jnp.ones((8, 2, 3))}
    axes = {"kernel": MatrixAxes(rows=(0,), columns=(1, 2))}
    updates = random_updates(4, params)
    state = run(track_subspace(rank=3, every=1, matrices=axes), [updates] * 8, params)
    s = np.linalg.svd(np.asarray(updates["kernel"], np.float64).reshape(8, 6), compute_uv=False)
    np.testing.assert_allclose(state.track_probes[0].values[0, 0], s[0], rtol=1e-3)


def test_the_effective_rank_of_lanczos():
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=(60, 50)), jnp.float32)
    state = run(track_subspace(rank=8, every=1, lanczos=(16, 24)), [{"w": x}] * 4, {"w": x})
    s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    p = s / s.sum()
    np.testing.assert_allclose(
        state.track_probes[0].effective_rank[0], np.exp(-(p * np.log(p)).sum()), rtol=0.05
    )


def test_gradient_descent_on_a_quadratic_stays_in_the_leading_directions():
    """The local theory (arXiv:2605.11739): d_s = sum_i (1 - (1 - eta l_i)^s) / l_i beta_i u_i.

    The loss is 1/2 sum_c d_c^T A d_c - b_c^T d_c for a matrix d with columns d_c; the tracked displacement
    follows the closed form, and its leading left directions are those of high curvature that b is in.
    """
    rng = np.random.default_rng(7)
    size, columns, eta, steps = 20, 6, 0.1, 40
    curvature = np.geomspace(8.0, 0.01, size)
    u = np.linalg.qr(rng.normal(size=(size, size)))[0]
    beta = np.zeros((size, columns))
    beta[:3] = rng.normal(size=(3, columns)) * np.array([[30.0], [10.0], [3.0]])  # concentrated in three
    a, b = jnp.asarray(u * curvature @ u.T, jnp.float32), jnp.asarray(u @ beta, jnp.float32)
    optimizer = optax.chain(optax.sgd(eta), track_subspace(rank=3, every=1, of="displacement"))
    params = {"w": jnp.zeros((size, columns))}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update({"w": a @ params["w"] - b}, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    expected = u @ (((1 - (1 - eta * curvature) ** steps) / curvature)[:, None] * beta)
    tracked = state[-1].track_displacement["w"]
    np.testing.assert_allclose(tracked, expected, atol=1e-4 * np.abs(expected).max())
    left = np.asarray(state[-1].track_probes[0].left[0], np.float64)
    assert np.linalg.svd(u[:, :3].T @ left, compute_uv=False).min() > 0.999
    np.testing.assert_allclose(state[-1].track_probes[0].energy, 1, rtol=1e-4)


def _linearised(base, inputs, residual):
    """A = E[J^T F J] and b = A residual for logits x W: with vec(W) row by row, J^T F J = x x^T (x) F."""
    p = np.exp(inputs @ base)
    p /= p.sum(-1, keepdims=True)
    fisher = [np.diag(row) - np.outer(row, row) for row in p]
    a = np.mean([np.kron(np.outer(x, x), f) for x, f in zip(inputs, fisher, strict=True)], axis=0)
    return np.linalg.eigh(a), a @ residual.ravel()


@pytest.mark.parametrize("base_scale", [0.0, 1.0])
def test_distillation_of_a_linear_softmax_student(base_scale):
    """Gradient descent on the reverse KL follows the closed form of the paper's section 6, in float64.

    The teacher is 1e-6 away, so that what the linearisation leaves out is as small. With a base of zero every
    p is uniform, and left singular directions are eigenvectors of E[x x^T]: the two of high curvature first.
    """
    rng = np.random.default_rng(8)
    width, words, eta, steps = 6, 5, 0.5, 25
    deviations = np.array([2.0, 1.5, 0.05, 0.05, 0.05, 0.05])
    u = np.linalg.qr(rng.normal(size=(width, width)))[0]
    inputs = rng.normal(size=(200, width)) * deviations @ u.T
    base = base_scale * rng.normal(size=(width, words))
    residual = 1e-6 * rng.normal(size=(width, words))
    (curvature, vectors), b = _linearised(base, inputs, residual)
    alive = curvature > 1e-12  # adding the same to all logits changes nothing
    growth = (1 - (1 - eta * curvature[alive]) ** steps) / curvature[alive]
    expected = (vectors[:, alive] @ (growth * (vectors[:, alive].T @ b))).reshape(width, words)
    with jax.enable_x64(True):
        x, teacher = jnp.asarray(inputs), jax.nn.log_softmax(jnp.asarray(inputs @ (base + residual)))

        def loss(params):
            student = jax.nn.log_softmax(x @ params["w"])
            return jnp.mean(jnp.sum(jnp.exp(student) * (student - teacher), axis=-1))

        optimizer = optax.chain(optax.sgd(eta), track_subspace(rank=2, every=1, of="displacement"))
        params = {"w": jnp.asarray(base)}
        state = optimizer.init(params)

        @jax.jit
        def step(params, state):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(steps):
            params, state = step(params, state)
    tracked = np.asarray(state[-1].track_displacement["w"])
    np.testing.assert_allclose(tracked, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    found = np.asarray(state[-1].track_probes[0].left[0], np.float64)
    exact = np.linalg.svd(expected)[0][:, :2]
    assert np.linalg.svd(exact.T @ found, compute_uv=False).min() > 0.9999
    if not base_scale:
        top = np.linalg.eigh(inputs.T @ inputs)[1][:, -2:]
        assert np.linalg.svd(top.T @ found, compute_uv=False).min() > 0.999


def test_small_matrices():
    with pytest.warns(UserWarning, match=r"attention\.q\.kernel is 8 x 6, too small for rank 7"):
        state = track_subspace(rank=7).init(PARAMS)
    assert state.track_probes[0].left.shape == (3, 8, 6)
    with pytest.raises(ValueError, match=r"8 x 6, too small for rank 7"):
        track_subspace(rank=7, on_small="error").init(PARAMS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(rank=0), "rank must be at least 1, got 0"),
        (dict(every=0), "every must be at least 1, got 0"),
        (dict(of="weights"), "of must be one of updates, gradients, displacement, got 'weights'"),
        (dict(lock_in=0.0), "lock_in must be in (0, 1], got 0.0"),
        (dict(on_small="ignore"), "on_small must be one of clamp, error"),
        (dict(lanczos=(0, 4)), "lanczos must be (probes, steps)"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(ValueError) as error:
        track_subspace(**arguments)
    assert says in str(error.value)


def test_parameters_that_change_and_states_that_are_not_there():
    transform = track_subspace(rank=2)
    state = transform.init(PARAMS)
    with pytest.raises(ValueError, match="those at init had the shapes"):
        transform.update({"w": jnp.ones((4, 4))}, state)
    with pytest.raises(ValueError, match="no matrix is selected among the 1 parameters"):
        transform.init({"norm": jnp.ones(3)})
    with pytest.raises(ValueError, match="the state holds 0 of track_subspace"):
        subspace_summary(optax.sgd(1.0).init(PARAMS), PARAMS)


@pytest.mark.parametrize("of", ["updates", "displacement"])
@pytest.mark.parametrize("layers", [(), (3,)])
def test_an_adapter_is_the_matrix_that_its_factors_make(of, layers):
    """Against numpy's SVD of how A B changes, which is never made by the transform."""
    rng = np.random.default_rng(6)

    def adapter(scale):
        a, b = rng.normal(size=(*layers, 20, 3)), rng.normal(size=(*layers, 3, 14))
        return {"q": {"kernel": {"lora_a": jnp.float32(scale * a), "lora_b": jnp.float32(scale * b)}}}

    start = params = adapter(0.5)
    transform = track_subspace(rank=6, every=1, of=of)
    state, update = transform.init(params), jax.jit(transform.update)
    for _ in range(4):
        updates, before = adapter(0.05), params
        _, state = update(updates, state, params)
        params = optax.apply_updates(params, updates)
    old = before if of == "updates" else start
    (new_ab, old_ab) = (
        np.asarray(f["lora_a"], np.float64) @ np.asarray(f["lora_b"], np.float64)
        for f in (params["q"]["kernel"], old["q"]["kernel"])
    )
    dense = (new_ab - old_ab).reshape(-1, 20, 14)
    (probe,) = state.track_probes
    u, s, _ = np.linalg.svd(dense, full_matrices=False)
    np.testing.assert_allclose(probe.values, s[:, :6], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(probe.norm, np.sqrt((s**2).sum(-1)), rtol=1e-4)
    np.testing.assert_allclose(
        np.abs(np.einsum("smi,smi->si", u[..., :2], probe.left[..., :2])), 1, atol=1e-4
    )
    p = s[:, :6] / s[:, :6].sum(-1, keepdims=True)
    np.testing.assert_allclose(probe.effective_rank, np.exp(-(p * np.log(p)).sum(-1)), rtol=1e-3)
    summary = subspace_summary(state, params)
    np.testing.assert_allclose(summary["q.kernel/spectral_norm"], s[:, 0].mean(), rtol=1e-4)
    with pytest.raises(ValueError, match="given the parameters"):
        transform.update(updates, state)


def test_gradients_of_an_adapter_are_followed_apart():
    params = {"q": {"lora_a": jnp.ones((20, 3)), "lora_b": jnp.ones((3, 14))}}
    transform = track_subspace(rank=2, of="gradients")
    _, state = transform.update(random_updates(0, params), transform.init(params))
    assert [probe.left.shape[1] for probe in state.track_probes] == [20, 3]
    assert "q.lora_a/energy" in subspace_summary(state, params)
