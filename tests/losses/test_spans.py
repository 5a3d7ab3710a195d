"""Span losses against sums over all completions; where every span is one token, against the token form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses

pytestmark = pytest.mark.usefixtures("quick_compilation")

# One compilation instead of one for each operation.
span_reverse_kl = jax.jit(losses.span_reverse_kl, static_argnames=("importance_clip", "discount", "beyond"))
span_sums = jax.jit(losses.span_sums, static_argnums=2)

V = 3
PAIRS = np.stack(np.meshgrid(range(V), range(V), indexing="ij"), -1).reshape(-1, 2)  # [9, 2]
RUNS = np.stack(np.meshgrid(*[range(V)] * 4, indexing="ij"), -1).reshape(-1, 4)  # [81, 4]
SPANS = jnp.array([0, 0, 1, 1])


def rng():
    return np.random.default_rng(7)


@pytest.fixture
def student():
    """Logits of a token after none, and after each other one."""
    r = rng()
    return jnp.asarray(r.normal(0, 1, V), jnp.float32), jnp.asarray(r.normal(0, 1, (V, V)), jnp.float32)


def token_log_probs(logits, runs):
    """[rows, N] of the tokens of a Markov chain."""
    first, after = jax.nn.log_softmax(logits[0]), jax.nn.log_softmax(logits[1])
    return jnp.concatenate([first[runs[:, :1]], after[runs[:, :-1], runs[:, 1:]]], axis=1)


def teacher_law(seed):
    """Log-probs [V, 9]: of two tokens at once after the token before (0 for none), normalised."""
    logits = np.random.default_rng(seed).normal(0, 1, (V, V * V))
    return jnp.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))


def expected(logits, sampler, loss, runs):
    """Gradient and value of the batch's loss, rows weighted as the sampler draws them."""
    weights = jnp.exp(token_log_probs(sampler, runs).sum(1))

    def mean(logits):
        return jnp.sum(weights * loss(token_log_probs(logits, runs)).sum(1))

    return jax.jit(jax.value_and_grad(mean))(logits)


def close(a, b, atol=2e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol)


def two_spans(p, q, rollout=None, discount=0.0):
    spans = jnp.broadcast_to(SPANS, p.shape)
    theirs = jnp.broadcast_to(jnp.arange(2), q.shape)
    return span_reverse_kl(p, spans, q, theirs, rollout, importance_clip=1e6, discount=discount)


def test_expectation_is_the_kl_of_the_span_laws(student):
    """Two tokens of the student against one of the teacher."""
    q = teacher_law(1)[0]

    def exact(logits):
        p = token_log_probs(logits, PAIRS).sum(1)
        return jnp.sum(jnp.exp(p) * (p - q))

    def loss(p):
        spans = jnp.zeros(p.shape, jnp.int32)
        return span_reverse_kl(p, spans, q[:, None], jnp.zeros((9, 1), jnp.int32))

    value, gradient = expected(student, student, loss, PAIRS)
    kl, slope = jax.jit(jax.value_and_grad(exact))(student)
    close((value, gradient), (kl, slope))
    # Token by token, with the teacher's log-prob on the last one, it is another gradient.
    theirs = jnp.stack([jnp.zeros(9), q], axis=1)
    _, wrong = expected(student, student, lambda p: losses.sampled_reverse_kl(p, theirs, p), PAIRS)
    assert max(np.abs(a - b).max() for a, b in zip(wrong, slope, strict=True)) > 1e-2


def test_two_teacher_tokens_for_one(student):
    """The other way round: the teacher's log-probs are summed."""
    q = jax.nn.log_softmax(jnp.asarray(rng().normal(0, 1, (V, 2)), jnp.float32), axis=0)

    def exact(logits):
        p = jax.nn.log_softmax(logits[0])
        return jnp.sum(jnp.exp(p) * (p - q.sum(1)))

    def loss(p):
        return span_reverse_kl(p, jnp.zeros((V, 1), int), q, jnp.zeros((V, 2), int))

    close(
        expected(student, student, loss, np.arange(V)[:, None]),
        jax.jit(jax.value_and_grad(exact))(student),
        atol=2e-6,
    )


@pytest.mark.parametrize("discount", [0.0, 1.0])
def test_two_spans(student, discount):
    """Discount 0: the KL at the visited states; 1: that of whole completions."""
    law = teacher_law(2)
    index = RUNS[:, 0::2] * V + RUNS[:, 1::2]
    before = np.stack([np.zeros(len(RUNS), int), RUNS[:, 1]], axis=1)
    q = law[before, index]
    fixed = token_log_probs(student, RUNS)

    def exact(logits):
        p = token_log_probs(logits, RUNS)
        if discount:
            return jnp.sum(jnp.exp(p.sum(1)) * (p.sum(1) - q.sum(1)))
        states = jnp.exp(fixed[:, :2].sum(1))  # how often the second span's state is visited
        first = jnp.sum(jnp.exp(p[:, :2].sum(1)) / V**2 * (p[:, :2].sum(1) - q[:, 0]))
        return first + jnp.sum(states * jnp.exp(p[:, 2:].sum(1)) * (p[:, 2:].sum(1) - q[:, 1]))

    value, gradient = expected(student, student, lambda p: two_spans(p, q, discount=discount), RUNS)
    kl, slope = jax.jit(jax.value_and_grad(exact))(student)
    close(gradient, slope)
    if not discount:  # above, a token's value holds what follows it, too
        close(value, kl)


def test_off_policy(student):
    """The importance weight is the span's."""
    r = np.random.default_rng(9)
    sampler = jax.tree.map(lambda a: a + jnp.asarray(r.normal(0, 0.5, a.shape), jnp.float32), student)
    q, zeros = teacher_law(1)[0][:, None], jnp.zeros((9, 2), int)
    rollout = token_log_probs(sampler, PAIRS)

    def loss(p):
        return span_reverse_kl(p, zeros, q, zeros[:, :1], rollout, importance_clip=1e6)

    def exact(logits):
        p = token_log_probs(logits, PAIRS).sum(1)
        return jnp.sum(jnp.exp(p) * (p - q[:, 0]))

    close(expected(student, sampler, loss, PAIRS), jax.jit(jax.value_and_grad(exact))(student), atol=5e-6)


def test_truncated_weights():
    p, rollout, q = (
        jnp.array([[-1.0, -1.0, -2.0]]),
        jnp.array([[-2.0, -2.5, -1.5]]),
        jnp.array([[-3.0, -1.0]]),
    )
    spans, theirs = jnp.array([[0, 0, 1]]), jnp.array([[0, 1]])
    args = spans, q, theirs, rollout
    value, pullback = jax.vjp(lambda p: span_reverse_kl(p, *args, importance_clip=3.0), p)
    np.testing.assert_allclose(value[0], [1.5, 1.5, -np.exp(-0.5)], rtol=1e-6)  # e^2.5 is above 3
    np.testing.assert_allclose(pullback(jnp.ones_like(p))[0][0], [3.0, 3.0, -np.exp(-0.5)], rtol=1e-6)
    masked = span_reverse_kl(p, *args, importance_clip=3.0, beyond="mask")
    np.testing.assert_allclose(masked[0], [0, 0, -np.exp(-0.5)], rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"discount": 1.0}, {"importance_clip": 1.2, "beyond": "mask"}])
def test_one_token_a_span_is_the_token_form(options):
    """Bitwise, values and gradients, with masked tokens and padding."""
    r = rng()
    p, q, rollout = (jnp.asarray(r.normal(-2, 1, (3, 7)), jnp.float32) for _ in range(3))
    spans = jnp.tile(jnp.arange(7), (3, 1))
    where = jnp.asarray(r.random((3, 7)) < 0.7)
    slope = jnp.asarray(r.normal(size=(3, 7)), jnp.float32)

    def token(p):
        return losses.sampled_reverse_kl(p, q, rollout, where=where, **options)

    def span(p):
        return span_reverse_kl(p, spans, q, spans, rollout, where=where, **options)

    (a, back), (b, pull) = jax.vjp(token, p), jax.vjp(span, p)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(back(slope)[0], pull(slope)[0])


def test_span_sums():
    r = rng()
    x, spans = r.normal(size=(4, 9)).astype(np.float32), r.integers(-1, 6, (4, 9))
    where = r.random((4, 9)) < 0.8
    wanted = np.array([[row[(s == i) & w].sum() for i in range(5)] for row, s, w in zip(x, spans, where)])  # noqa: B905
    np.testing.assert_allclose(span_sums(x, spans, 5, where), wanted, atol=1e-6)
    bad = jnp.where(jnp.asarray((spans < 0) | ~where), jnp.nan, x)  # what is left out may be anything
    np.testing.assert_allclose(span_sums(bad, spans, 5, where), wanted, atol=1e-6)
    gradient = jax.grad(lambda x: span_sums(x, spans, 5, where).sum())(bad)
    np.testing.assert_array_equal(gradient, (spans >= 0) & (spans < 5) & where)


def test_what_counts():
    """Tokens without a span, half-masked spans, spans the teacher lacks: 0 whatever stands there."""
    nan, inf = jnp.nan, jnp.inf
    p = jnp.array([[-1.0, -2.0, nan, -1.0, nan, -1.5, -1.0, -inf]])
    spans = jnp.array([[0, 0, -1, 1, 1, 2, 3, -1]])
    q = jnp.array([[-4.0, -1.0, -1.0, -9.0, nan]])
    theirs = jnp.array([[0, 1, 2, 2, -1]])
    where = jnp.array([[1, 1, 1, 1, 0, 1, 1, 0]])

    def loss(p, q, rollout):
        return span_reverse_kl(p, spans, q, theirs, rollout, where=where)

    value = loss(p, q, p)
    np.testing.assert_allclose(value, [[0.5, 0.5, 0, 0, 0, 8.5, 0, 0]], rtol=1e-6)
    gradients = jax.jit(jax.grad(lambda *a: loss(*a).sum(), argnums=(0, 1, 2)))(p, q, p)
    np.testing.assert_allclose(gradients[0], [[1, 1, 0, 0, 0, 8.5, 0, 0]], rtol=1e-6)
    assert not gradients[1].any() and not gradients[2].any()
    nothing = span_reverse_kl(p, jnp.full_like(spans, -1), q, theirs)
    np.testing.assert_array_equal(nothing, jnp.zeros_like(p))


def test_bfloat16():
    p, q = jnp.array([[-1.0, -2.0]], jnp.bfloat16), jnp.array([[-4.0]], jnp.bfloat16)
    zeros = jnp.zeros((1, 2), jnp.int32)
    value, gradient = jax.value_and_grad(lambda p: span_reverse_kl(p, zeros, q, zeros[:, :1]).sum())(p)
    assert value == 1.0 and value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16


def test_wrong_inputs():
    p, s = jnp.zeros((2, 3)), jnp.zeros((2, 3), int)
    for clip in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="importance_clip must be positive"):
            span_reverse_kl(p, s, p, s, importance_clip=clip)
    with pytest.raises(ValueError, match="discount must be in"):
        span_reverse_kl(p, s, p, s, discount=1.5)
    with pytest.raises(ValueError, match="sampled tokens"):
        losses.span_sums(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4), int), 2)
    for args in ((p, s[:, :2], p, s), (p, s, p[:, :2], s), (p, p, p, s), (p, s, p, s, p[:, :2])):
        with pytest.raises((AssertionError, ValueError)):
            span_reverse_kl(*args)
