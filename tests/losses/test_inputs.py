"""Temperature, padded vocabularies, floors and checks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return rng.normal(0, 2, (3, 8)).astype(np.float32), rng.normal(0, 2, (3, 8)).astype(np.float32)


def at(temperature, student, teacher):
    return losses.reverse_kl(*(losses.log_softmax(a, temperature) for a in (student, teacher))).sum()


def test_temperature(logits):
    shifted = logits[0].astype(np.float64) / 3
    expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    np.testing.assert_allclose(losses.log_softmax(logits[0], 3.0), expected, atol=1e-6)
    assert losses.log_softmax(logits[0].astype(jnp.bfloat16)).dtype == jnp.float32
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            losses.log_softmax(logits[0], wrong)


def test_gradient_scale_of_the_temperature(logits):
    """1 / T by the chain rule; about 1 / T^2 in all where the logits differ by little against T."""
    student, teacher = map(jnp.asarray, logits)
    for temperature in (0.5, 2.0):
        slope = jax.grad(lambda s, t=temperature: at(t, s, teacher))(student)
        scaled = jax.grad(lambda s, t=temperature: at(1.0, s, teacher / t))(student / temperature)
        np.testing.assert_allclose(slope, scaled / temperature, atol=1e-6)
    norms = [jnp.linalg.norm(jax.grad(lambda s, t=t: at(t, s, teacher))(student)) for t in (50.0, 100.0)]
    np.testing.assert_allclose(norms[0] / norms[1], 4, rtol=0.05)


def test_vocabularies_padded_differently(logits):
    """The same loss and gradient as unpadded, and no gradient to the padding."""
    student, teacher = map(jnp.asarray, logits)
    value, slope = jax.value_and_grad(at, argnums=1)(1.0, student, teacher)
    rng = np.random.default_rng(1)
    padded = [
        jnp.concatenate([a, rng.normal(0, 9, (3, n))], axis=-1) for a, n in ((student, 5), (teacher, 2))
    ]

    def cut(s, t):
        return at(1.0, *losses.common_vocabulary(s, t, size=8))

    padded_value, padded_slope = jax.value_and_grad(cut)(*padded)
    np.testing.assert_allclose(padded_value, value, rtol=1e-6)
    np.testing.assert_allclose(padded_slope[:, :8], slope, atol=1e-6)
    assert not padded_slope[:, 8:].any()
    assert [a.shape for a in losses.common_vocabulary(*padded)] == [(3, 10)] * 2
    for size in (0, 11):
        with pytest.raises(ValueError, match="1 to 10 tokens"):
            losses.common_vocabulary(*padded, size=size)


def test_floor_keeps_the_students_gradient():
    """Mass where the teacher has none is pushed away with a bounded force, not ignored and not infinite."""
    student = jnp.array([0.5, 0.0, -1.0])
    teacher = jax.nn.log_softmax(jnp.array([1.0, 0.0, -jnp.inf]))

    def loss(s, minimum):
        return losses.reverse_kl(jax.nn.log_softmax(s), losses.floor_log_probs(teacher, minimum))

    assert losses.reverse_kl(jax.nn.log_softmax(student), teacher) == jnp.inf
    value, slope = jax.value_and_grad(loss)(student, -30.0)
    p = np.exp(np.asarray(jax.nn.log_softmax(student), np.float64))
    ratio = np.log(p) - np.maximum(np.asarray(teacher, np.float64), -30)
    np.testing.assert_allclose(value, (p * ratio).sum(), rtol=1e-6)
    np.testing.assert_allclose(slope, p * (ratio - (p * ratio).sum()), rtol=1e-5)
    assert slope[2] > 1  # descent lowers that logit
    with pytest.raises(ValueError, match="negative and finite"):
        losses.floor_log_probs(teacher, 0.0)


def test_checks(logits):
    good = [np.asarray(jax.nn.log_softmax(a)) for a in logits]
    losses.check_log_probs(*good)
    losses.check_log_probs(*(jnp.asarray(a, jnp.bfloat16) for a in good), tolerance=0.05)

    def broken(which, place, value):
        arrays = [a.copy() for a in good]
        arrays[which][place] = value
        return arrays

    with pytest.raises(ValueError, match=r"teacher log-probs at \(1,\) are NaN"):
        losses.check_log_probs(*broken(1, (1, 2), np.nan))
    with pytest.raises(ValueError, match=r"student log-probs at \(2,\) are not normalised"):
        losses.check_log_probs(*broken(0, (2, 0), 0.5))
    with pytest.raises(ValueError, match="not normalised: probabilities sum to inf"):
        losses.check_log_probs(*broken(0, (2, 0), np.inf))
    with pytest.raises(ValueError, match="one shape"):
        losses.check_log_probs(good[0], good[1][:, :-1])
    excluding = np.asarray(jax.nn.log_softmax(np.where(np.arange(8) == 3, -np.inf, logits[1])))
    with pytest.raises(ValueError, match=r"probability 0 at \(0,\)"):
        losses.check_log_probs(good[0], excluding)
    losses.check_log_probs(excluding, good[1])  # the student may exclude
    losses.check_log_probs(*broken(1, (1, 2), np.nan), where=[1, 0, 1])
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(losses.check_log_probs)(*good)
