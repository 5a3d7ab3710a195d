"""Score-function losses against sums over all tokens, in float64 where it matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses

V = 7


@pytest.fixture
def laws():
    """Log-probs [V] of a student, a teacher and the policy that sampled."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1.5, (3, V))
    logits[2] = logits[0] + rng.normal(0, 0.3, V)
    return [jnp.asarray(a, jnp.float32) for a in logits]


def exact_gradient(student, teacher):
    p, q = (np.asarray(jax.nn.log_softmax(a), np.float64) for a in (student, teacher))
    kl = (np.exp(p) * (p - q)).sum()
    return np.exp(p) * (p - q - kl), kl


def expectation(loss, logits, sampler):
    """Gradient and value of `loss(log_probs [1, V]) -> [1, V]`, tokens weighted as `sampler` draws them."""
    weights = jax.nn.softmax(sampler)

    def mean(logits):
        return jnp.sum(weights * loss(jax.nn.log_softmax(logits)[None])[0])

    value, gradient = jax.value_and_grad(mean)(logits)
    return np.asarray(gradient), float(value)


def test_on_policy_expectation_is_the_reverse_kl(laws):
    student, teacher, _ = laws
    rollout, q = jax.nn.log_softmax(student)[None], jax.nn.log_softmax(teacher)[None]
    gradient, value = expectation(lambda p: losses.sampled_reverse_kl(p, q, rollout), student, student)
    exact, kl = exact_gradient(student, teacher)
    np.testing.assert_allclose(gradient, exact, atol=1e-6)
    np.testing.assert_allclose(value, kl, rtol=1e-5)


def test_off_policy_expectation_is_the_reverse_kl_while_nothing_is_truncated(laws):
    student, teacher, sampler = laws
    rollout, q = jax.nn.log_softmax(sampler)[None], jax.nn.log_softmax(teacher)[None]
    exact, kl = exact_gradient(student, teacher)
    gradient, value = expectation(
        lambda p: losses.sampled_reverse_kl(p, q, rollout, importance_clip=1e6), student, sampler
    )
    np.testing.assert_allclose(gradient, exact, atol=1e-6)
    np.testing.assert_allclose(value, kl, rtol=1e-5)
    # Without the weight it is another gradient: the test above can fail.
    wrong, _ = expectation(lambda p: losses.sampled_reverse_kl(p, q, p), student, sampler)
    assert np.abs(wrong - exact).max() > 1e-3


def test_weights_are_truncated(laws):
    student, teacher, _ = laws
    rollout = np.asarray(jax.nn.log_softmax(student), np.float64) - np.linspace(-2, 4, V)
    p, q = (np.asarray(jax.nn.log_softmax(a), np.float64) for a in (student, teacher))
    weight = np.minimum(np.exp(p - rollout), 5.0)
    assert (weight == 5).any() and (weight < 1).any()
    rows = [jnp.asarray(a, jnp.float32)[None] for a in (p, q, rollout)]
    value, pullback = jax.vjp(lambda p: losses.sampled_reverse_kl(p, *rows[1:]), rows[0])
    np.testing.assert_allclose(value[0], weight * (p - q), rtol=1e-5, atol=1e-6)
    # The gradient in log p is weight * (log p - log q): neither weight nor advantage is differentiated.
    np.testing.assert_allclose(pullback(jnp.ones((1, V)))[0][0], weight * (p - q), rtol=1e-5, atol=1e-6)
    lower = losses.sampled_reverse_kl(*rows, importance_clip=0.5)
    np.testing.assert_allclose(lower[0], np.minimum(weight, 0.5) * (p - q), rtol=1e-5, atol=1e-6)


def test_no_gradient_reaches_teacher_or_sampler(laws):
    rows = [jax.nn.log_softmax(a)[None] for a in laws]
    gradients = jax.grad(lambda *a: losses.sampled_reverse_kl(*a).sum(), argnums=(1, 2))(*rows)
    assert not np.any(gradients)


def test_student_equal_to_teacher(laws):
    student, _, sampler = laws
    p, rollout = jax.nn.log_softmax(student)[None], jax.nn.log_softmax(sampler)[None]
    value, pullback = jax.vjp(lambda p_: losses.sampled_reverse_kl(p_, p, rollout), p)
    assert not value.any() and not pullback(jnp.ones_like(value))[0].any()


def test_sampled_where_and_dtype():
    p = jnp.array([[-1.0, jnp.nan, -2.0]], jnp.bfloat16)
    q = jnp.array([[-1.5, -jnp.inf, -1.0]], jnp.bfloat16)
    rollout = jnp.array([[-1.0, 0.0, -2.0]], jnp.bfloat16)
    where = jnp.array([[1, 0, 1]])
    value, gradient = jax.value_and_grad(
        lambda p: losses.sampled_reverse_kl(p, q, rollout, where=where).sum()
    )(p)
    assert value.dtype == jnp.float32 and value == -0.5
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), [[0.5, 0, -1]])


def test_sampled_wrong_inputs():
    a = jnp.zeros((2, 3))
    for clip in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="importance_clip must be positive"):
            losses.sampled_reverse_kl(a, a, a, importance_clip=clip)
    with pytest.raises(AssertionError):
        losses.sampled_reverse_kl(a, a[:1], a)


def numpy_clipped(log_probs, rollout, advantages, low, high):
    """Value and derivative in log p, token by token."""
    values, slopes = np.zeros_like(log_probs), np.zeros_like(log_probs)
    for i, (p, r, a) in enumerate(zip(log_probs, rollout, advantages, strict=True)):
        ratio = np.exp(p - r)
        bounded = min(max(ratio, 1 - low), 1 + high)
        if ratio * a <= bounded * a:
            values[i], slopes[i] = -ratio * a, -ratio * a
        else:
            values[i], slopes[i] = -bounded * a, 0.0
    return values, slopes


@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.2, 0.28), (0.0, 3.0)])
def test_clipped_policy_gradient(clip):
    rng = np.random.default_rng(4)
    rollout = rng.normal(-2, 0.5, 200)
    log_probs = rollout + rng.normal(0, 0.4, 200)
    advantages = rng.normal(0, 1, 200)
    values, slopes = numpy_clipped(log_probs, rollout, advantages, *clip)
    assert (slopes == 0).any() and (slopes != 0).any()
    rows = [jnp.asarray(a, jnp.float32)[None] for a in (log_probs, rollout, advantages)]
    got, pullback = jax.vjp(lambda *a: losses.clipped_policy_gradient(*a, clip=clip), *rows)
    np.testing.assert_allclose(got[0], values, rtol=1e-5, atol=1e-6)
    in_log_probs, in_rollout, in_advantages = pullback(jnp.ones_like(got))
    np.testing.assert_allclose(in_log_probs[0], slopes, rtol=1e-5, atol=1e-6)
    assert not in_rollout.any() and not in_advantages.any()


def test_clipped_on_policy_gradient_is_plain():
    """At ratio 1 the derivative is -A, not half of it where minimum and clip meet."""
    rows = jnp.full((1, 3), -1.0)
    advantages = jnp.array([[2.0, -3.0, 0.0]])
    gradient = jax.grad(lambda p: losses.clipped_policy_gradient(p, rows, advantages).sum())(rows)
    np.testing.assert_array_equal(gradient, -advantages)


def test_clipped_where():
    p = jnp.array([[-1.0, jnp.nan, 500.0]])
    rollout = jnp.array([[-1.0, 0.0, -500.0]])
    advantages = jnp.array([[1.0, jnp.inf, 1.0]])

    def loss(p):
        return losses.clipped_policy_gradient(p, rollout, advantages, where=[[True, False, False]])

    np.testing.assert_array_equal(loss(p), [[-1, 0, 0]])
    np.testing.assert_array_equal(jax.grad(lambda p: loss(p).sum())(p), [[-1, 0, 0]])


@pytest.mark.parametrize("clip", [(-0.1, 0.2), (1.0, 0.2), (0.2, -0.1)])
def test_clipped_wrong_clip(clip):
    a = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="clip must be"):
        losses.clipped_policy_gradient(a, a, a, clip=clip)


def test_group_advantages():
    rewards = np.random.default_rng(5).normal(size=12)
    groups = rewards.reshape(3, 4)
    spread = groups.std(1, ddof=1, keepdims=True)
    expected = ((groups - groups.mean(1, keepdims=True)) / (spread + 1e-6)).reshape(-1)
    np.testing.assert_allclose(losses.group_advantages(rewards, 4), expected, rtol=1e-5)
    # They do not depend on the scale or level of the rewards, nor on other groups.
    np.testing.assert_allclose(losses.group_advantages(5 * rewards - 3, 4), expected, rtol=1e-4)
    np.testing.assert_allclose(losses.group_advantages(rewards[4:8], 4), expected[4:8], rtol=1e-5)


def test_equal_rewards_have_no_advantage():
    np.testing.assert_array_equal(losses.group_advantages([1, 1, 1, 0, 0, 0], 3), np.zeros(6))


@pytest.mark.parametrize("size", [0, 1, 4, -2])
def test_wrong_group_size(size):
    with pytest.raises(ValueError, match="divide the 6 rewards"):
        losses.group_advantages(np.zeros(6), size)
