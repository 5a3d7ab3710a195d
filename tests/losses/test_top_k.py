"""K tokens and the rest: against the whole vocabulary, by enumeration."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from opd_jax import losses
from tests.losses.enumeration import DIVERGENCES, gradient, of_logits, softmax

V = 9
SOURCES = ("student", "teacher", "union")


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return rng.normal(0, 2, (4, V)).astype(np.float32), rng.normal(0, 2, (4, V)).astype(np.float32)


@pytest.mark.parametrize("source", SOURCES)
def test_categories(logits, source):
    """Each support and its tail by sets, in float64."""
    log_probs = [jax.nn.log_softmax(a) for a in logits]
    support = losses.top_k_support(*log_probs, 3, source)
    p = softmax(logits[0])
    coarse = np.asarray(losses.coarsen(log_probs[0], support))
    for row in range(4):
        top = [set(np.argsort(-a[row])[:3].tolist()) for a in logits]
        wanted = {"student": top[0], "teacher": top[1], "union": top[0] | top[1]}[source]
        valid = np.asarray(support.valid[row])
        ids = np.asarray(support.ids[row])[valid]
        assert len(ids) == len(wanted) and set(ids.tolist()) == wanted
        np.testing.assert_allclose(np.exp(coarse[row, :-1][valid]), p[row, ids], rtol=1e-5)
        np.testing.assert_allclose(np.exp(coarse[row, -1]), 1 - p[row, ids].sum(), rtol=1e-4)
        assert (coarse[row, :-1][~valid] == -np.inf).all()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd 0.1", "total_variation"])
@settings(max_examples=25, deadline=None)
@given(
    pair=hnp.arrays(np.float32, (2, V), elements=st.floats(-8, 8, width=32)),
    form=st.sampled_from([(1, "student"), (3, "teacher"), (3, "union"), (V, "student")]),
)
def test_lower_bound(name, pair, form):
    k, source = form
    divergence, _ = DIVERGENCES[name]
    full = float(of_logits(divergence, *pair))
    coarse = float(of_logits(_top_k(divergence, k, source), *pair))
    assert -2e-6 <= coarse <= full * (1 + 1e-5) + 2e-6
    if k == V:
        np.testing.assert_allclose(coarse, full, rtol=1e-5, atol=1e-6)
    assert float(of_logits(_top_k(divergence, k, source), pair[0], pair[0])) == 0


_FORMS = {}


def _top_k(divergence, k, source):
    key = (divergence, k, source)
    return _FORMS.setdefault(key, partial(losses.top_k, divergence, k=k, support=source))


def test_zero_iff_equal_on_the_partition():
    """Tails of equal mass and different shape are the same here; a different mass is not."""
    p = np.array([0.5, 0.2, 0.2, 0.1])
    same, other = np.array([0.5, 0.2, 0.05, 0.25]), np.array([0.5, 0.1, 0.2, 0.2])
    support = losses.Support(jnp.array([0, 1]), jnp.array([True, True]))
    value = partial(losses.top_k, losses.reverse_kl, jnp.log(jnp.asarray(p, jnp.float32)), support=support)
    assert abs(value(jnp.log(jnp.asarray(same, jnp.float32)))) < 1e-6
    assert value(jnp.log(jnp.asarray(other, jnp.float32))) > 1e-2


@pytest.mark.parametrize("divergence", [losses.reverse_kl, losses.forward_kl])
def test_minimiser_keeps_the_teachers_mass_inside_and_outside(divergence):
    """Descending the bucket form finds the teacher; the truncated sums, which are refused, do not."""
    teacher = jnp.array([2.0, 1.5, 0.5, 0.0, 0.3, -0.5])
    q = jax.nn.log_softmax(teacher)
    support = losses.Support(jnp.array([0, 1]), jnp.array([True, True]))
    inside = softmax(teacher)[:2].sum()

    def bucket(logits):
        return losses.top_k(divergence, jax.nn.log_softmax(logits), q, support=support)

    def dropped(logits):
        return divergence(jax.nn.log_softmax(logits)[:2], q[:2])

    def minimise(loss):
        optimizer = optax.adam(0.1)

        def step(carry, _):
            logits, state = carry
            updates, state = optimizer.update(jax.grad(loss)(logits), state)
            return (optax.apply_updates(logits, updates), state), None

        start = jnp.array([-1.0, 1.0, 0.0, 2.0, 0.0, 0.0])
        (logits, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=600)
        return np.asarray(jax.nn.softmax(logits))

    found = minimise(bucket)
    np.testing.assert_allclose(found[:2], softmax(teacher)[:2], atol=2e-3)
    np.testing.assert_allclose(found[2:].sum(), 1 - inside, atol=2e-3)
    wrong = minimise(dropped)[:2].sum()  # each p_v -> q_v / e, or all mass inside
    assert abs(wrong - (inside / np.e if divergence is losses.reverse_kl else 1)) < 0.02


@pytest.mark.parametrize(
    "tail, why", [("drop", "nothing renormalised"), ("renormalise", "as good as any other")]
)
def test_refused_truncations(logits, tail, why):
    with pytest.raises(ValueError, match=rf"{why}.*tail='bucket'"):
        losses.top_k(losses.reverse_kl, *logits, k=2, tail=tail)


def test_wrong_options(logits):
    for k in (0, V + 1, None):
        with pytest.raises(ValueError, match="k must be from 1 to the vocabulary's 9"):
            losses.top_k(losses.reverse_kl, *logits, k=k)
    with pytest.raises(ValueError, match="student, teacher, union"):
        losses.top_k_support(*logits, 2, "both")
    with pytest.raises(ValueError, match="'bucket'"):
        losses.top_k(losses.reverse_kl, *logits, k=2, tail="mean")


def test_tail_from_a_cache(logits):
    """K log-probs that a server returned give the same categories as the whole distribution."""
    log_probs = jax.nn.log_softmax(logits[1])
    support = losses.top_k_support(log_probs, log_probs, 4)
    stored = jnp.take_along_axis(log_probs, support.ids, axis=-1)
    np.testing.assert_allclose(losses.with_tail(stored), losses.coarsen(log_probs, support), rtol=1e-4)
    certain = losses.with_tail(jnp.array([[0.0, -40.0]]))
    assert np.isfinite(certain).all() and certain[0, -1] < -16


@pytest.mark.parametrize("source", SOURCES)
def test_gradient_where_nothing_is_outside(logits, source):
    received = gradient(_top_k(losses.reverse_kl, V, source), *logits)
    np.testing.assert_allclose(received, gradient(losses.reverse_kl, *logits), atol=1e-6)
    padded = [np.pad(a, ((0, 0), (0, 3)), constant_values=-np.inf) for a in logits]
    received = gradient(_top_k(losses.reverse_kl, V, source), *padded)
    np.testing.assert_allclose(received[:, :V], gradient(losses.reverse_kl, *logits), atol=1e-6)
    assert not received[:, V:].any()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("off_policy", [False, True])
def test_exact_support_and_sampled_tail_is_the_full_reverse_kl(logits, source, off_policy):
    """Summed over every token that could be sampled, value and gradient are those of the whole vocabulary."""
    student, teacher = (jnp.asarray(a[0]) for a in logits)
    sampler = student + 0.3 * jnp.asarray(logits[0][1]) if off_policy else student
    rollout = jax.nn.log_softmax(sampler)
    tokens = jnp.arange(V)

    @jax.jit
    @jax.value_and_grad
    def mean(student):
        p = jnp.broadcast_to(jax.nn.log_softmax(student), (V, V))
        q = jnp.broadcast_to(jax.nn.log_softmax(teacher), (V, V))
        loss = losses.sampled_tail_reverse_kl(
            p, q, tokens, k=3, support=source, rollout_log_probs=rollout, importance_clip=1e6
        )
        return jnp.sum(jnp.exp(rollout) * loss)

    value, slope = mean(student)
    np.testing.assert_allclose(value, of_logits(losses.reverse_kl, student, teacher), rtol=1e-5)
    np.testing.assert_allclose(slope, gradient(losses.reverse_kl, student, teacher), atol=1e-6)


def test_sampled_tail_varies_less_than_the_sampled_token(logits):
    student, teacher = (jnp.asarray(a[0]) for a in logits)
    p = jnp.broadcast_to(jax.nn.log_softmax(student), (V, V))
    q = jnp.broadcast_to(jax.nn.log_softmax(teacher), (V, V))
    mixed = losses.sampled_tail_reverse_kl(p, q, jnp.arange(V), k=6)
    sampled = p[0] - q[0]
    weights = jnp.exp(p[0])
    kl = losses.reverse_kl(p[0], q[0])
    assert (weights * (mixed - kl) ** 2).sum() < 0.5 * (weights * (sampled - kl) ** 2).sum()


def test_sampled_tail_where(logits):
    student, teacher = (jax.nn.log_softmax(a) for a in logits)
    where = np.array([1, 0, 1, 1], bool)
    broken = student.at[1].set(jnp.nan)
    tokens = jnp.array([0, 5, 2, 8])

    @jax.jit
    def loss(s):
        return losses.sampled_tail_reverse_kl(s, teacher, tokens, k=2, where=where)

    expected = losses.sampled_tail_reverse_kl(student, teacher, tokens, k=2)
    np.testing.assert_allclose(loss(broken), np.where(where, expected, 0), rtol=1e-6)
    slope = jax.grad(lambda s: loss(s).sum())(broken)
    assert np.isfinite(slope).all() and not slope[1].any()
