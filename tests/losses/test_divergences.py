"""reverse_kl against enumeration in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def exact(student_logits, teacher_logits):
    """(KL, its gradient in the student's logits) by the closed form, float64."""
    p, q = log_softmax(student_logits), log_softmax(teacher_logits)
    with np.errstate(invalid="ignore"):
        ratio = np.where(np.exp(p) > 0, p - q, 0)
    kl = (np.exp(p) * ratio).sum(-1)
    return kl, np.exp(p) * (ratio - kl[..., None])


def of_logits(student, teacher, **kwargs):
    return losses.reverse_kl(jax.nn.log_softmax(student), jax.nn.log_softmax(teacher), **kwargs)


def total_gradient(student, teacher, **kwargs):
    return jax.grad(lambda s: of_logits(s, teacher, **kwargs).sum())(student)


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return rng.normal(0, 3, (4, 5, 13)).astype(np.float32), rng.normal(0, 3, (4, 5, 13)).astype(np.float32)


def test_value_and_gradient(logits):
    kl, gradient = exact(*logits)
    value = of_logits(*logits)
    assert value.shape == (4, 5) and value.dtype == jnp.float32
    np.testing.assert_allclose(value, kl, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(total_gradient(*logits), gradient, rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_the_value(logits):
    """The closed form above, checked by differences of the enumerated KL in float64."""
    student, teacher = (np.asarray(a[0, 0], np.float64) for a in logits)
    step = 1e-5 * np.eye(13)
    differences = (exact(student + step, teacher)[0] - exact(student - step, teacher)[0]) / 2e-5
    np.testing.assert_allclose(exact(student, teacher)[1], differences, atol=1e-8)


def test_gradient_in_the_teacher(logits):
    """It is a function of both arguments: d KL / d teacher logits = q - p."""
    student, teacher = logits
    gradient = jax.grad(lambda t: of_logits(student, t).sum())(teacher)
    expected = np.exp(log_softmax(teacher)) - np.exp(log_softmax(student))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_equal_distributions_give_zero(logits):
    student, _ = logits
    assert not np.any(of_logits(student, student))
    np.testing.assert_allclose(total_gradient(student, student), 0, atol=np.finfo(np.float32).eps)
    # A shift of the logits is the same distribution.
    np.testing.assert_allclose(of_logits(student, student + 100), 0, atol=2e-5)


def test_tokens_excluded_by_the_student(logits):
    """-inf in the student alone, and in both (a padded vocabulary): finite value and gradient."""
    student, teacher = (a.copy() for a in logits)
    student[..., -4:] = -np.inf
    teacher[..., -2:] = -np.inf
    kl, _ = exact(student, teacher)
    np.testing.assert_allclose(of_logits(student, teacher), kl, rtol=2e-6)
    gradient = np.asarray(total_gradient(student, teacher))
    assert np.isfinite(gradient).all() and not gradient[..., -4:].any()


def test_padding_of_both_vocabularies_changes_nothing(logits):
    padded = [np.pad(a, ((0, 0), (0, 0), (0, 3)), constant_values=-np.inf) for a in logits]
    np.testing.assert_allclose(of_logits(*padded), of_logits(*logits), rtol=1e-6)
    gradient = total_gradient(*padded)
    np.testing.assert_allclose(gradient[..., :-3], total_gradient(*logits), atol=1e-6)
    assert not gradient[..., -3:].any()


@pytest.mark.parametrize("log_prob", [-1.0, -200.0])  # exp(-200) is 0 in float32
def test_infinite_where_the_teacher_excludes_what_the_student_can_say(log_prob):
    student = jnp.array([np.log1p(-np.exp(log_prob)), log_prob], jnp.float32)
    assert losses.reverse_kl(student, jnp.array([0.0, -jnp.inf])) == jnp.inf


@pytest.mark.parametrize("which", [0, 1])
def test_not_a_number_shows(logits, which):
    """A broken model must not look like one that agrees with its teacher."""
    broken = [a.copy() for a in logits]
    broken[which][1, 2, 3] = np.nan
    value = np.asarray(of_logits(*broken))
    assert np.isnan(value[1, 2]) and np.isnan(value).sum() == 1


def test_where_leaves_rows_out(logits):
    student, teacher = (a.copy() for a in logits)
    where = np.random.default_rng(1).random((4, 5)) < 0.5
    kl, gradient = exact(student, teacher)
    log_probs = [log_softmax(a).astype(np.float32) for a in (student, teacher)]
    log_probs[0][~where], log_probs[1][~where] = np.nan, np.inf
    value, pullback = jax.vjp(
        lambda s: losses.reverse_kl(s, log_probs[1], where=where[..., None]), log_probs[0]
    )
    np.testing.assert_allclose(value, np.where(where, kl, 0), rtol=2e-6, atol=1e-6)
    received = np.asarray(pullback(jnp.ones_like(value))[0])
    assert not received[~where].any()
    # Through the softmax the remaining gradient is the exact one.
    p = np.exp(log_softmax(logits[0]))
    inner = received - p * received.sum(-1, keepdims=True)
    np.testing.assert_allclose(inner[where], gradient[where], rtol=1e-5, atol=2e-6)


def test_where_leaves_tokens_out(logits):
    where = np.arange(13) < 9
    p, q = (log_softmax(a) for a in logits)
    expected = np.where(where, np.exp(p) * (p - q), 0).sum(-1)
    np.testing.assert_allclose(of_logits(*logits, where=where), expected, rtol=1e-5, atol=1e-6)


def test_axis(logits):
    moved = [np.moveaxis(np.asarray(log_softmax(a), np.float32), -1, 0) for a in logits]
    np.testing.assert_allclose(losses.reverse_kl(*moved, axis=0), exact(*logits)[0], rtol=2e-6, atol=1e-6)


def test_bfloat16_inputs_are_summed_in_float32(logits):
    p, q = (jnp.asarray(log_softmax(a)).astype(jnp.bfloat16) for a in logits)
    value = losses.reverse_kl(p, q)
    wide_p, wide_q = (np.asarray(a.astype(jnp.float32), np.float64) for a in (p, q))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, (np.exp(wide_p) * (wide_p - wide_q)).sum(-1), rtol=1e-5, atol=1e-6)
    assert jax.grad(lambda p: losses.reverse_kl(p, q).sum())(p).dtype == jnp.bfloat16


def test_extreme_logits():
    student = jnp.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]])
    teacher = jnp.array([[0.0, 0.0, 0.0], [1e4, 0.0, -1e4]])
    kl, gradient = exact(student, teacher)
    np.testing.assert_allclose(of_logits(student, teacher), kl, rtol=1e-6)
    rounding = np.finfo(np.float32).eps * np.abs(gradient).max()
    np.testing.assert_allclose(total_gradient(student, teacher), gradient, rtol=1e-5, atol=rounding)


def test_wrong_inputs(logits):
    with pytest.raises(AssertionError):
        losses.reverse_kl(logits[0], logits[1][..., :-1])
    with pytest.raises(AssertionError):
        losses.reverse_kl(np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32))
