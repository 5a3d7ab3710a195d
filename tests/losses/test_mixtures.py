"""Limits of the interpolating divergences, and their options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses
from tests.losses.enumeration import gradient, jsd, kl, of_logits, softmax


@pytest.fixture
def pair():
    rng = np.random.default_rng(2)
    return rng.normal(0, 2, (6, 9)).astype(np.float32), rng.normal(0, 2, (6, 9)).astype(np.float32)


@pytest.mark.parametrize("beta", [1e-6, 1e-4, 1e-2, 0.3])
def test_scaled_jsd_is_continuous_with_both_kls(pair, beta):
    student, teacher = (a / 2 for a in pair)
    p, q = softmax(student), softmax(teacher)
    for end, b in (("forward_kl", beta), ("reverse_kl", 1 - beta)):
        value = of_logits(losses.jsd, student, teacher, beta=b, scaled=True)
        limit = of_logits(getattr(losses, end), student, teacher)
        # The distance to the limit falls with beta; at 1e-6 what is left is rounding.
        assert np.abs(value - limit).max() < 20 * beta + 1e-5
        slope = gradient(losses.jsd, student, teacher, beta=b, scaled=True)
        assert np.abs(slope - gradient(getattr(losses, end), student, teacher)).max() < 20 * beta + 1e-5
        if beta >= 1e-2:  # against the definition, which cancels in float64 below
            np.testing.assert_allclose(value, jsd(p, q, b) / (b * (1 - b)), rtol=1e-5)


def test_scaled_jsd_ends_are_the_kls(pair):
    for beta, end in ((0, losses.forward_kl), (0.0, losses.forward_kl), (1, losses.reverse_kl)):
        value = of_logits(losses.jsd, *pair, beta=beta, scaled=True)
        np.testing.assert_array_equal(value, of_logits(end, *pair))


def test_unscaled_jsd_vanishes_towards_both_ends(pair):
    """GKD's definition: beta KL(q||p) and (1 - beta) KL(p||q), not a KL; the documented limit."""
    student, teacher = pair
    p, q = softmax(student), softmax(teacher)
    for beta, limit in ((1e-5, 1e-5 * kl(q, p)), (1 - 1e-5, 1e-5 * kl(p, q))):
        np.testing.assert_allclose(of_logits(losses.jsd, student, teacher, beta=beta), limit, rtol=2e-2)


def test_jsd_mixes_the_teacher_with_weight_beta(pair):
    """The most copied mistake is the other way round."""
    student, teacher = pair
    p, q = softmax(student), softmax(teacher)
    value = of_logits(losses.jsd, student, teacher, beta=0.2)
    np.testing.assert_allclose(value, jsd(p, q, 0.2), rtol=1e-5)
    assert np.abs(value - jsd(p, q, 0.8)).max() > 1e-2


@pytest.mark.parametrize("beta", [0, 1, -0.1, 1.5, float("nan")])
def test_jsd_refuses_betas(pair, beta):
    with pytest.raises(ValueError, match="beta must be inside"):
        losses.jsd(*pair, beta=beta)
    if beta not in (0, 1):
        with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
            losses.jsd(*pair, beta=beta, scaled=True)


@pytest.mark.parametrize("name, limit", [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_skew(pair, name, limit):
    skewed, limit = getattr(losses, name), getattr(losses, limit)
    np.testing.assert_array_equal(of_logits(skewed, *pair, skew=0), of_logits(limit, *pair))
    near = of_logits(skewed, *pair, skew=1e-6)
    np.testing.assert_allclose(near, of_logits(limit, *pair), rtol=1e-3)
    assert of_logits(skewed, jnp.array([0.0, -1e4]), jnp.array([-1e4, 0.0])) == pytest.approx(np.log(10))
    for skew in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="skew must be"):
            skewed(*pair, skew=skew)


def test_mixed_kl_weights(pair):
    student, teacher = pair
    forward, reverse = of_logits(losses.forward_kl, *pair), of_logits(losses.reverse_kl, *pair)
    np.testing.assert_array_equal(of_logits(losses.mixed_kl, *pair, forward_weight=1.0), forward)
    np.testing.assert_array_equal(of_logits(losses.mixed_kl, *pair, forward_weight=0), reverse)
    weight = jnp.linspace(0, 1, 6)
    value = of_logits(losses.mixed_kl, *pair, forward_weight=weight)
    np.testing.assert_allclose(value, weight * forward + (1 - weight) * reverse, rtol=1e-6)
    # The reverse KL is infinite here and does not count: neither in the value nor in the gradient.
    teacher = teacher.copy()
    teacher[:, 0] = -np.inf
    value, slope = jax.value_and_grad(
        lambda s: of_logits(losses.mixed_kl, s, teacher, forward_weight=jnp.ones(6)).sum()
    )(student)
    np.testing.assert_allclose(value, kl(softmax(teacher), softmax(student)).sum(), rtol=1e-5)
    assert np.isfinite(slope).all()
    # A weight carries no gradient.
    slope = jax.grad(lambda w: of_logits(losses.mixed_kl, *pair, forward_weight=w).sum())(weight)
    assert not slope.any()
    with pytest.raises(ValueError, match="forward_weight"):
        losses.mixed_kl(*pair, forward_weight=1.1)


def test_entropy_aware_kl_adds_the_forward_kl_where_the_teacher_is_uncertain():
    teacher = jnp.array([[0.0, 0.1, 0.0], [9.0, 0.0, 0.0]])
    student = jnp.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    value = of_logits(losses.entropy_aware_kl, student, teacher, threshold=0.8)
    forward, reverse = (of_logits(d, student, teacher) for d in (losses.forward_kl, losses.reverse_kl))
    np.testing.assert_allclose(value, reverse + forward * jnp.array([1, 0]), rtol=1e-6)
    with pytest.raises(ValueError, match="nats"):
        losses.entropy_aware_kl(student, teacher, threshold=-1.0)


def test_entropy():
    logits = np.random.default_rng(3).normal(0, 3, (5, 8)).astype(np.float32)
    logits[0, 1:] = -np.inf
    p = softmax(logits)
    expected = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    np.testing.assert_allclose(losses.entropy(jax.nn.log_softmax(logits)), expected, rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda z: losses.entropy(jax.nn.log_softmax(z)).sum())(jnp.asarray(logits))
    assert np.isfinite(slope).all()
