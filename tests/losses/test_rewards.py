"""Score-function forms over whole completions, by enumeration of all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses

V, T = 3, 3
SEQUENCES = np.array(list(itertools.product(range(V), repeat=T)))  # [V^T, T]


def table(seed, scale=1.0):
    """Logits of a model with one row for every context of fewer than T tokens."""
    contexts = sum(V**t for t in range(T))
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, (contexts, V)), jnp.float32)


def contexts():
    """The row of `table` that each token of each sequence is drawn from, [V^T, T]."""
    rows = np.zeros_like(SEQUENCES)
    for t in range(1, T):
        before = sum(SEQUENCES[:, s] * V ** (t - 1 - s) for s in range(t))
        rows[:, t] = sum(V**s for s in range(t)) + before
    return rows


ROWS = contexts()


def log_probs(logits):
    """Of every token of every completion, [V^T, T]."""
    return jax.nn.log_softmax(logits)[ROWS, SEQUENCES]


STUDENT, TEACHER, SAMPLER = table(0), table(1), table(0) + 0.3 * table(2)


def expected_gradient(loss, sampler):
    """Of the summed loss, over all completions as the sampler draws them."""
    weights = jnp.exp(log_probs(sampler).sum(-1))
    return jax.value_and_grad(lambda s: jnp.sum(weights * loss(log_probs(s)).sum(-1)))(STUDENT)


def exact_gradient(discount):
    """Sum over completions, positions t and later positions of gamma^k l_{t+k} grad log p_t, in float64."""
    p, q = (np.asarray(log_probs(a), np.float64) for a in (STUDENT, TEACHER))
    ratio = p - q
    returns = np.array([[sum(discount**k * r[t + k] for k in range(T - t)) for t in range(T)] for r in ratio])
    weights = np.exp(p.sum(-1))
    softmax = np.asarray(jax.nn.softmax(STUDENT), np.float64)
    gradient = np.zeros(STUDENT.shape)
    for n, t in np.ndindex(*SEQUENCES.shape):
        row = ROWS[n, t]
        score = np.eye(V)[SEQUENCES[n, t]] - softmax[row]
        gradient[row] += weights[n] * returns[n, t] * score
    return gradient


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_discounted_policy_gradient(discount):
    q = log_probs(TEACHER)

    def loss(p):
        return losses.sampled_reverse_kl(p, q, jax.lax.stop_gradient(p), discount=discount)

    _, gradient = expected_gradient(loss, STUDENT)
    np.testing.assert_allclose(gradient, exact_gradient(discount), atol=2e-6)


def test_undiscounted_it_is_the_gradient_of_the_sequences_kl():
    def kl(student):
        p = log_probs(student).sum(-1)
        return jnp.sum(jnp.exp(p) * (p - log_probs(TEACHER).sum(-1)))

    np.testing.assert_allclose(exact_gradient(1.0), jax.grad(kl)(STUDENT), atol=2e-6)


def test_sequence_weights_make_another_policys_completions_unbiased():
    """Whole-completion weights correct the visited states too; token weights do not."""
    q, rollout = log_probs(TEACHER), log_probs(SAMPLER)

    def loss(level):
        return lambda p: losses.sampled_reverse_kl(
            p, q, rollout, importance_clip=1e6, level=level, discount=1.0
        )

    exact = exact_gradient(1.0)
    _, gradient = expected_gradient(loss("sequence"), SAMPLER)
    np.testing.assert_allclose(gradient, exact, atol=2e-6)
    _, gradient = expected_gradient(loss("token"), SAMPLER)
    assert np.abs(gradient - exact).max() > 1e-2


def test_importance_weights():
    p = jnp.log(jnp.array([[0.9, 0.5, 0.1], [0.2, 0.2, 0.2]]))
    rollout = jnp.log(jnp.array([[0.1, 0.5, 0.2], [0.1, 0.1, 0.2]]))
    weights = losses.importance_weights
    np.testing.assert_allclose(weights(p, rollout), [[5, 1, 0.5], [2, 2, 1]], rtol=1e-5)
    np.testing.assert_allclose(weights(p, rollout, beyond="mask"), [[0, 1, 0.5], [2, 2, 1]], rtol=1e-5)
    np.testing.assert_allclose(weights(p, rollout, level="sequence"), [[4.5] * 3, [4] * 3], rtol=1e-5)
    np.testing.assert_allclose(
        weights(p, rollout, 4.2, level="sequence", beyond="mask"), [[0] * 3, [4] * 3], rtol=1e-5
    )
    where = jnp.array([[0, 1, 1], [1, 1, 1]])
    np.testing.assert_allclose(
        weights(p.at[0, 0].set(jnp.nan), rollout, level="sequence", where=where),
        [[1, 0.5, 0.5], [4] * 3],
        rtol=1e-5,
    )
    slope = jax.grad(lambda p: weights(p, rollout).sum())(p)
    assert not slope.any()
    for wrong in (dict(bound=0.0), dict(level="word"), dict(beyond="drop")):
        with pytest.raises(ValueError, match="must be"):
            weights(p, rollout, **wrong)


def test_discounted_sums():
    values = np.random.default_rng(0).normal(size=(4, 9))
    where = np.random.default_rng(1).random((4, 9)) < 0.7
    for gamma in (0.0, 0.3, 0.99, 1.0):
        expected = np.zeros_like(values)
        later = np.zeros(4)
        for t in reversed(range(9)):
            later = np.where(where[:, t], values[:, t], 0) + gamma * later
            expected[:, t] = later
        broken = jnp.asarray(np.where(where, values, np.nan), jnp.float32)
        received = losses.discounted_sums(broken, gamma, where)
        np.testing.assert_allclose(received, np.where(where, expected, 0), rtol=1e-5, atol=1e-6)
    for gamma in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"discount must be in \[0, 1\]"):
            losses.discounted_sums(values, gamma)


def test_extrapolated_advantages_minimise_the_kl_to_the_extrapolated_teacher():
    reference, scale = table(3), 1.25
    target = jax.nn.log_softmax(scale * TEACHER + (1 - scale) * reference)
    q, ref = log_probs(TEACHER), log_probs(reference)

    def loss(p):
        advantages = losses.extrapolated_advantages(p, q, ref, scale)
        return losses.policy_gradient(p, jax.lax.stop_gradient(p), advantages)

    _, gradient = expected_gradient(loss, STUDENT)
    # At each state, weighted by how often it is visited.
    p = np.asarray(log_probs(STUDENT), np.float64)
    visits = np.zeros(len(STUDENT))
    prefixes = np.exp(np.cumsum(p, axis=1) - p)
    for t in range(T):
        for row in set(ROWS[:, t].tolist()):
            visits[row] = prefixes[np.argmax(ROWS[:, t] == row), t]
    per_state = jax.grad(lambda s: losses.reverse_kl(jax.nn.log_softmax(s), target).sum())(STUDENT)
    np.testing.assert_allclose(gradient, visits[:, None] * per_state, atol=2e-6)


def test_extrapolation_by_one_is_plain_distillation():
    p, q, ref = (log_probs(a) for a in (STUDENT, TEACHER, table(3)))
    np.testing.assert_array_equal(losses.extrapolated_advantages(p, q, ref, scale=1.0), q - p)
    plain = losses.sampled_reverse_kl(p, q, p)
    np.testing.assert_array_equal(losses.policy_gradient(p, p, q - p), plain)
    with pytest.raises(ValueError, match="scale"):
        losses.extrapolated_advantages(p, q, ref, scale=-1.0)


def test_task_and_distillation():
    p, q = (log_probs(a)[:4] for a in (STUDENT, TEACHER))
    task = jnp.array([1.0, -1.0, 0.5, 0.0])
    where = jnp.ones((4, T), bool).at[1, 2].set(False)
    parts = losses.task_and_distillation(
        task, p.at[1, 2].set(jnp.nan), q, task_weight=2.0, distillation_weight=0.1, discount=0.5, where=where
    )
    np.testing.assert_allclose(parts.total, parts.task + parts.distillation, rtol=1e-6)
    np.testing.assert_array_equal(parts.task, jnp.where(where, 2 * task[:, None], 0))
    np.testing.assert_allclose(
        parts.distillation, 0.1 * losses.discounted_sums(jnp.where(where, q - p, 0), 0.5, where), atol=1e-7
    )
    per_token = losses.task_and_distillation(jnp.ones((4, T)), p, q)
    np.testing.assert_allclose(per_token.total, 1 + q - p, rtol=1e-6)
    with pytest.raises((AssertionError, ValueError)):
        losses.task_and_distillation(jnp.ones((4, T + 1)), p, q)


def test_no_gradient_through_any_advantage():
    ref, task = log_probs(table(3)), jnp.ones(len(SEQUENCES))

    def everything(p, q):
        parts = losses.task_and_distillation(task, p, q, discount=0.5)
        return losses.extrapolated_advantages(p, q, ref).sum() + sum(a.sum() for a in parts)

    for slope in jax.grad(everything, argnums=(0, 1))(log_probs(STUDENT), log_probs(TEACHER)):
        assert not slope.any()
    slope = jax.grad(lambda a: losses.policy_gradient(log_probs(STUDENT), log_probs(STUDENT), a).sum())(
        log_probs(TEACHER)
    )
    assert not slope.any()


def estimate(kind, log_ratio):
    return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": jnp.exp(-log_ratio) - 1 + log_ratio}[kind]


def test_what_differentiating_the_estimates_would_give():
    """k3 differentiated is the forward KL, k1 nothing, k2 the reverse KL: why only a metric is offered."""
    student, teacher = STUDENT[0], TEACHER[0]
    p = jax.nn.log_softmax(student)
    q = jax.nn.log_softmax(teacher)

    def direct(kind):
        return jax.grad(lambda s: jnp.sum(jnp.exp(p) * estimate(kind, jax.nn.log_softmax(s) - q)))(student)

    forward, reverse = (
        jax.grad(lambda s, d=d: d(jax.nn.log_softmax(s), q))(student)
        for d in (losses.forward_kl, losses.reverse_kl)
    )
    np.testing.assert_allclose(direct("k3"), forward, atol=1e-6)
    np.testing.assert_allclose(direct("k1"), 0, atol=1e-6)
    np.testing.assert_allclose(direct("k2"), reverse, atol=1e-6)
    assert np.abs(forward - reverse).max() > 1e-2


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_estimates_are_metrics(kind):
    p, q = log_probs(STUDENT), log_probs(TEACHER)
    np.testing.assert_allclose(losses.kl_estimate(p, q, kind), estimate(kind, p - q), rtol=1e-4, atol=1e-6)
    if kind != "k2":  # unbiased
        mean = jnp.sum(jnp.exp(p.sum(-1, keepdims=True)) * losses.kl_estimate(p, q, kind))
        exact = jnp.sum(jnp.exp(p.sum(-1)) * (p - q).sum(-1))
        np.testing.assert_allclose(mean, exact, rtol=1e-4)
    for transform in (jax.grad, lambda f: jax.jit(jax.grad(f))):
        with pytest.raises(ValueError, match=r"cannot be differentiated.*sampled_reverse_kl"):
            transform(lambda p: losses.kl_estimate(p, q, kind).sum())(p)

    def logged(p):
        return losses.reverse_kl(p, q).sum(), losses.kl_estimate(jax.lax.stop_gradient(p), q, kind)

    jax.jit(jax.grad(logged, has_aux=True))(p)
    with pytest.raises(ValueError, match="k1"):
        losses.kl_estimate(p, q, "abs")


class TestTokenReward:
    tokens = jnp.array([[0, 2], [1, 1]])
    student = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, V)), jnp.float32))
    teacher = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, V)), jnp.float32))

    def reward(self, function):
        return losses.token_reward(function, self.tokens, self.student, self.teacher)

    @staticmethod
    def log_ratio(y, p, q):
        return jnp.take_along_axis(q - p, y[..., None], axis=-1)[..., 0]

    def test_a_reward_of_the_sampled_token_passes(self):
        expected = self.log_ratio(self.tokens, self.student, self.teacher)
        np.testing.assert_allclose(self.reward(self.log_ratio), expected)
        np.testing.assert_allclose(self.reward(jax.jit(self.log_ratio)), expected)
        scanned = self.reward(
            lambda y, p, q: jax.lax.scan(lambda c, x: (c, self.log_ratio(*x)), 0.0, (y, p, q))[1]
        )
        np.testing.assert_allclose(scanned, expected)

    @pytest.mark.parametrize(
        "function",
        [
            lambda y, p, q: -losses.reverse_kl(p, q),
            lambda y, p, q: -losses.top_k(losses.forward_kl, p, q, k=2),
            lambda y, p, q: jnp.ones(y.shape),
            jax.jit(lambda y, p, q: -losses.jsd(p, q)),
            jax.checkpoint(lambda y, p, q: losses.entropy(q)),
        ],
    )
    def test_a_reward_of_the_context_alone_is_refused(self, function):
        with pytest.raises(ValueError, match="does not depend on the sampled tokens"):
            self.reward(function)

    def test_why(self):
        """Its expected gradient is 0, whatever the reward."""
        p, q = (jax.nn.log_softmax(a[0]) for a in (STUDENT, TEACHER))
        reward = jnp.broadcast_to(-losses.reverse_kl(p, q), (1, V))

        def mean(s):
            log_p = jax.nn.log_softmax(s)[None]
            return jnp.sum(jnp.exp(p) * losses.policy_gradient(log_p, p[None], reward))

        np.testing.assert_allclose(jax.grad(mean)(STUDENT[0]), 0, atol=1e-6)

    def test_shapes_and_gradient(self):
        with pytest.raises(ValueError, match=r"tokens' shape \(2, 2\)"):
            self.reward(lambda y, p, q: q - p)
        slope = jax.grad(lambda p: losses.token_reward(self.log_ratio, self.tokens, p, self.teacher).sum())(
            self.student
        )
        assert not slope.any()

    def test_distributions_are_refused_where_sampled_tokens_belong(self):
        whole = (self.student, self.teacher, self.student)
        for call in (
            lambda: losses.sampled_reverse_kl(*whole),
            lambda: losses.policy_gradient(*whole),
            lambda: losses.clipped_policy_gradient(*whole),
            lambda: losses.extrapolated_advantages(*whole),
            lambda: losses.kl_estimate(*whole[:2]),
        ):
            with pytest.raises(ValueError, match=r"log-probs of the sampled tokens, \[B, T\]"):
                call()
