"""What holds for every divergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.losses.enumeration import DIVERGENCES, FINITE, differences, gradient, of_logits, softmax

EVERY = pytest.mark.parametrize("name", DIVERGENCES)
V = 7
QUICK = settings(max_examples=20, deadline=None)

logits_pairs = hnp.arrays(np.float32, (2, V), elements=st.floats(-12, 12, width=32))


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return rng.normal(0, 2, (4, 5, V)).astype(np.float32), rng.normal(0, 2, (4, 5, V)).astype(np.float32)


@EVERY
def test_value_and_gradient_in_float64(name, logits):
    divergence, definition = DIVERGENCES[name]
    student, teacher = logits
    value = of_logits(divergence, student, teacher)
    assert value.shape == (4, 5) and value.dtype == jnp.float32
    np.testing.assert_allclose(value, definition(softmax(student), softmax(teacher)), rtol=3e-6, atol=3e-7)
    expected = differences(lambda p: definition(p, softmax(teacher)), student)
    np.testing.assert_allclose(gradient(divergence, student, teacher), expected, rtol=1e-5, atol=1e-6)


@EVERY
@QUICK
@given(pair=logits_pairs)
def test_never_negative_and_zero_at_the_teacher(name, pair):
    divergence, definition = DIVERGENCES[name]
    student, teacher = pair
    exact = definition(softmax(student), softmax(teacher))
    value = float(of_logits(divergence, student, teacher))
    assert value >= -2e-6 and abs(value - exact) <= 1e-5 * (1 + exact)
    assert float(of_logits(divergence, student, student)) == 0
    np.testing.assert_allclose(gradient(divergence, student, student), 0, atol=5e-7)
    if exact > 1e-5:  # zero only there
        assert value > 0


@EVERY
@QUICK
@given(pair=logits_pairs, order=st.permutations(range(V)), shift=st.floats(-50, 50))
def test_permutation_and_shift_change_nothing(name, pair, order, shift):
    divergence, _ = DIVERGENCES[name]
    student, teacher = pair
    if name == "entropy_aware_kl":  # a step function of the teacher's entropy
        teacher = teacher / 20
    value = of_logits(divergence, student, teacher)
    np.testing.assert_allclose(
        of_logits(divergence, *pair_take(student, teacher, order)), value, rtol=1e-5, atol=2e-6
    )
    moved = of_logits(divergence, student + np.float32(shift), teacher - np.float32(shift))
    np.testing.assert_allclose(moved, value, rtol=2e-4, atol=1e-4)  # the shift itself rounds
    # A gradient in logits that moves them all alike would change nothing: it sums to 0.
    assert abs(gradient(divergence, student, teacher).sum()) < 1e-5


def pair_take(student, teacher, order):
    return student[np.array(order)], teacher[np.array(order)]


@EVERY
def test_mask(name, logits):
    """Left-out rows count 0 whatever they hold, and change nothing in the others."""
    divergence, _ = DIVERGENCES[name]

    @jax.jit
    def value_and_gradient(student, teacher, where):
        value, pullback = jax.vjp(lambda s: divergence(s, teacher, where=where[..., None]), student)
        return value, pullback(jnp.ones_like(value))[0]

    student, teacher = (jax.nn.log_softmax(a) for a in logits)
    value, slope = value_and_gradient(student, teacher, np.ones((4, 5), bool))

    @QUICK
    @example(where=np.zeros((4, 5), bool))
    @given(where=hnp.arrays(bool, (4, 5)))
    def check(where):
        broken = [np.where(where[..., None], a, bad) for a, bad in ((student, np.nan), (teacher, -np.inf))]
        received = value_and_gradient(*broken, where)
        np.testing.assert_array_equal(received[0], np.where(where, value, 0))
        np.testing.assert_array_equal(received[1], np.where(where[..., None], slope, 0))

    check()


@EVERY
def test_not_a_number_shows(name, logits):
    divergence, _ = DIVERGENCES[name]
    for which in range(2):
        broken = [a.copy() for a in logits]
        broken[which][1, 2, 3] = np.nan
        value = np.asarray(of_logits(divergence, *broken))
        assert np.isnan(value[1, 2]) and np.isnan(value).sum() == 1


@EVERY
def test_bfloat16_is_summed_in_float32(name, logits):
    divergence, definition = DIVERGENCES[name]
    narrow = [jax.nn.log_softmax(a).astype(jnp.bfloat16) for a in logits]
    value, slope = jax.jit(jax.value_and_grad(lambda s: divergence(s, narrow[1]).sum()))(narrow[0])
    wide = [np.exp(np.asarray(a, np.float64)) for a in narrow]
    assert value.dtype == jnp.float32 and slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, definition(*wide).sum(), rtol=1e-5)


@EVERY
def test_padding_of_both_vocabularies_changes_nothing(name, logits):
    divergence, definition = DIVERGENCES[name]
    padded = [np.where(np.arange(V) < V - 3, a, -np.inf).astype(np.float32) for a in logits]
    short = [a[..., :-3] for a in logits]
    value = of_logits(divergence, *padded)
    np.testing.assert_allclose(value, definition(*map(softmax, short)), rtol=3e-6, atol=3e-7)
    received = gradient(divergence, *padded)
    expected = differences(lambda p: definition(p, softmax(short[1])), short[0])
    np.testing.assert_allclose(received[..., :-3], expected, rtol=1e-5, atol=1e-6)
    assert not received[..., -3:].any()


@pytest.mark.parametrize("name", FINITE)
def test_finite_whatever_either_model_excludes(name, logits):
    divergence, definition = DIVERGENCES[name]
    student, teacher = (a.copy() for a in logits)
    student[..., :2] = -np.inf
    teacher[..., 1:4] = -np.inf
    np.testing.assert_allclose(
        of_logits(divergence, student, teacher), definition(softmax(student), softmax(teacher)), rtol=1e-5
    )
    received = gradient(divergence, student, teacher)
    assert np.isfinite(received).all() and not received[..., :2].any()


@EVERY
def test_extreme_logits(name):
    divergence, definition = DIVERGENCES[name]
    student, teacher = np.zeros((2, 4, 5, V), np.float32)
    student[0, :3, :3] = [[1e4, 0, -1e4], [0, 0, 0], [60, 0, -60]]
    teacher[0, :3, :3] = [[0, 0, 0], [90, 0, -90], [-60, 0, 60]]
    p, q = softmax(student), softmax(teacher)
    exact = definition(p, q)
    value = np.asarray(of_logits(divergence, student, teacher))
    finite = np.isfinite(exact) & (exact < 1e3)  # exp(-1e4) is 0 in float64: its KL is not
    np.testing.assert_allclose(value[finite], exact[finite], rtol=1e-5)
    assert np.isfinite(gradient(divergence, student, teacher)).all()


@EVERY
def test_axis_and_shapes(name, logits):
    divergence, _ = DIVERGENCES[name]
    log_probs = [np.asarray(jax.nn.log_softmax(a)) for a in logits]
    moved = [np.moveaxis(a, -1, 1) for a in log_probs]
    value = jax.jit(lambda *a: divergence(*a, axis=1))(*moved)
    np.testing.assert_allclose(value, of_logits(divergence, *logits), rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        divergence(log_probs[0], log_probs[1][..., :-1])
    with pytest.raises(AssertionError):
        divergence(np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32))


@EVERY
def test_runs_with_strict_promotion(name, logits):
    divergence, _ = DIVERGENCES[name]
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.jit(jax.grad(lambda s, t: of_logits(divergence, s, t).sum())).trace(*logits)
