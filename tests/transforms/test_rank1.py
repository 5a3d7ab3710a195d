"""predict_rank1 against exact linear paths and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.transforms import MatrixAxes, predict_rank1

X = np.array(
    [
        [2.04, -2.56, 0.42, -0.57, -0.45, -0.22, -2.02],
        [-0.23, -0.87, 3.32, 0.23, -0.35, -0.28, -0.67],
        [-1.06, -0.39, 0.48, -0.24, 0.96, -0.2, 0.02],
        [1.55, 0.55, -0.51, -0.18, 0.54, 1.94, -0.27],
        [-0.24, 1.0, -0.89, -0.29, 0.88, 0.58, 0.09],
    ],
    np.float32,
)
Y = [0.1, 0.25, 0.3, 0.5, 0.45]
# scikit-learn 1.x on X, Y: t = PLSRegression(n_components=1, scale=...).fit_transform(X, Y)[0]; Y over t by
# LinearRegression, inverted at 1.0; inverse_transform.
SKLEARN = {
    True: [-1.78396279, 5.50548619, -3.56205273, -0.01118273, 2.95786037, 3.20208879, 2.89717233],
    False: [-1.16299145, 5.42581838, -4.61708137, -0.22056429, 2.99877306, 3.39076162, 2.65765281],
}


@pytest.mark.parametrize("standardize", [True, False])
def test_against_scikit_learn(standardize):
    v = np.array([0.6, 0.0, -0.8], np.float32)
    base = {"up": jnp.full((7, 3), 0.5)}
    checkpoints = [{"up": base["up"] + jnp.outer(x, v)} for x in X]
    predicted = predict_rank1(base, checkpoints, Y, standardize=standardize)["up"] - 0.5
    np.testing.assert_allclose(predicted, np.outer(SKLEARN[standardize], v), atol=5e-6)


def layer(rng):
    """Base and a path along which each matrix gains t of one rank-1 and a smaller, fixed rank-1 beside it."""
    base, u, v = (rng.normal(size=s) for s in ((2, 6, 4), (2, 6), (2, 4)))
    return base, np.einsum("lm,ln->lmn", u, v)


def test_linear_path_is_continued():
    """Stacked layers, singly, and an attention kernel [D, N, H] whose columns are (N, H)."""
    rng = np.random.default_rng(0)
    base, slope = layer(rng)

    def at(t):
        kernel = jnp.asarray(base + t * slope, jnp.float32)
        return {"mlp": {"up": kernel}, "attention": {"q": kernel[0].reshape(6, 2, 2)}, "norm": jnp.full(3, t)}

    matrices = {
        "mlp": {"up": True},
        "attention": {"q": MatrixAxes(rows=(0,), columns=(1, 2))},
        "norm": None,
    }
    steps = [0.05, 0.1, 0.2]
    predicted = predict_rank1(at(0.0), [at(t) for t in steps], steps, 0.9, matrices)
    expected = at(0.9)
    np.testing.assert_allclose(predicted["mlp"]["up"], expected["mlp"]["up"], atol=2e-5)
    np.testing.assert_allclose(predicted["attention"]["q"], expected["attention"]["q"], atol=2e-5)
    assert not predicted["norm"].any()  # the base's


def test_only_the_first_component_is_continued():
    base = jnp.zeros((3, 3))
    grow, stay = np.diag([1.0, 0, 0]), np.diag([0, 0.05, 0.02])
    checkpoints = [jnp.asarray(t * grow + stay, jnp.float32) for t in (0.1, 0.2, 0.3)]
    predicted = predict_rank1({"up": base}, [{"up": c} for c in checkpoints], [1.0, 2.0, 3.0], 10.0)
    np.testing.assert_allclose(predicted["up"], grow, atol=1e-6)


def test_what_did_not_move_stays():
    base = {"up": jnp.ones((3, 2), jnp.bfloat16), "down": jnp.zeros((2, 3), jnp.float32)}
    moved = [base | {"down": t * jnp.ones((2, 3))} for t in (1.0, 2.0)]
    predicted = predict_rank1(base, moved, [1.0, 2.0], 3.0)
    assert predicted["up"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(predicted["up"], base["up"])
    np.testing.assert_allclose(predicted["down"], 3.0, rtol=1e-6)
    # Without covariance with progress: the last rank-1 part.
    still = [{"up": jnp.ones((3, 2))}] * 2
    np.testing.assert_allclose(
        predict_rank1({"up": jnp.zeros((3, 2))}, still, [1.0, 2.0])["up"], 1.0, rtol=1e-6
    )


def test_sharding_is_the_bases():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    base = {"up": jax.device_put(jnp.zeros((8, 4)), sharding)}
    predicted = predict_rank1(base, [{"up": jnp.ones((8, 4)) * t} for t in (1.0, 2.0)], [0.1, 0.2])
    assert predicted["up"].sharding == sharding
    np.testing.assert_allclose(predicted["up"], 10.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("count", "progress", "message"),
    [
        (1, [1.0], "at least 2"),
        (2, [1.0], "progress of shape"),
        (2, [1.0, 1.0], "not all equal"),
        (2, [1.0, np.nan], "finite"),
    ],
)
def test_bad_input(count, progress, message):
    params = {"up": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=message):
        predict_rank1(params, [params] * count, progress)


def test_a_checkpoint_of_another_model():
    params = {"up": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"checkpoint 1 has float32\[2, 3\].* at up"):
        predict_rank1(params, [params, {"up": jnp.ones((2, 3))}], [1.0, 2.0])
