"""Draws against the exact law, computed by sorting in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from opd_jax.rollout import Sampling, _sampling, sample

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAWS = {
    "plain": Sampling(),
    "hot": Sampling(temperature=2.5),
    "cold": Sampling(temperature=0.4),
    "top_k": Sampling(top_k=5),
    "top_p": Sampling(top_p=0.7),
    "min_p": Sampling(min_p=0.1),
    "all": Sampling(temperature=1.7, top_k=20, top_p=0.9, min_p=0.05),
}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    with np.errstate(divide="ignore"):
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def nucleus(probs, top_p):
    """Shortest prefix of the sorted probabilities whose sum reaches top_p; how near any sum comes to it."""
    order = np.argsort(-probs, kind="stable")
    sums = np.cumsum(probs[order])
    count = int(np.argmax(sums >= top_p)) + 1
    kept = np.zeros(probs.shape, bool)
    kept[order[:count]] = True
    return kept, np.abs(sums - top_p).min()


def law(logits, sampling):
    """Log-probs of the sampled law of one row [V], float64."""
    logits = np.asarray(logits, np.float64) / sampling.temperature
    if sampling.top_k:
        logits = np.where(logits >= np.sort(logits)[-sampling.top_k], logits, -np.inf)
    if sampling.top_p < 1:
        kept, _ = nucleus(np.exp(log_softmax(logits)), sampling.top_p)
        logits = np.where(kept, logits, -np.inf)
    if sampling.min_p:
        probs = np.exp(log_softmax(logits))
        logits = np.where(probs >= sampling.min_p * probs.max(), logits, -np.inf)
    return log_softmax(logits)


jitted = jax.jit(sample, static_argnums=2)


@functools.partial(jax.jit, static_argnames=("sampling",))
def _draws(logits, keys, sampling):
    rows = jnp.broadcast_to(logits, (*keys.shape[1:], *logits.shape))
    return jax.lax.map(lambda k: sample(rows, k, sampling), keys)


def draws(logits, sampling, count, seed=0, chunk=2048):
    """`count` draws from one row [V]: tokens, log_probs, sampled_log_probs as numpy."""
    chunk = min(chunk, count)
    keys = jax.random.split(jax.random.key(seed), (count // chunk, chunk))
    return [np.asarray(a).reshape(-1) for a in _draws(jnp.asarray(logits), keys, sampling)]


def check_frequencies(tokens, log_law, bins=40):
    """A chi-square test of tokens against their law; tokens of the same bin are counted together."""
    probs = np.exp(log_law)
    assert np.isfinite(log_law[tokens]).all(), "a token of probability 0 was drawn"
    order = np.argsort(-probs)
    edges = np.minimum((np.cumsum(probs[order]) * bins).astype(int), bins - 1)
    group = np.empty(len(probs), int)
    group[order] = edges
    expected = np.bincount(group, probs, bins) * len(tokens)
    seen = np.bincount(group[tokens], minlength=bins)
    used = expected > 5
    assert used.sum() > 1
    expected, seen = expected[used], seen[used]
    rest = len(tokens) - expected.sum(), len(tokens) - seen.sum()
    if rest[0] > 1e-6 * len(tokens):
        expected, seen = np.append(expected, rest[0]), np.append(seen, rest[1])
    statistic = ((seen - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(statistic, len(expected) - 1) > 1e-4, (statistic, len(expected))


@pytest.mark.parametrize("name", LAWS)
def test_frequencies_and_log_probs(name):
    logits = np.random.default_rng(0).normal(0, 2, 300).astype(np.float32)  # not a multiple of 256
    tokens, log_probs, sampled = draws(logits, LAWS[name], 20480)
    expected = law(logits, LAWS[name])
    check_frequencies(tokens, expected)
    np.testing.assert_allclose(sampled, expected[tokens], atol=1e-5)
    np.testing.assert_allclose(log_probs, log_softmax(logits)[tokens], atol=1e-5)
    kept = np.flatnonzero(np.isfinite(expected))
    if len(kept) < 20:
        assert set(tokens) == set(kept)


@pytest.mark.parametrize("vocab", [2, 37, 257])
def test_vocabularies_of_any_size(vocab):
    logits = np.random.default_rng(vocab).normal(0, 1.5, vocab).astype(np.float32)
    logits[1] += 1
    tokens, _, _ = draws(logits, Sampling(), 16384)
    check_frequencies(tokens, log_softmax(logits))


def test_a_large_vocabulary():
    logits = np.random.default_rng(1).normal(0, 2, 50_001).astype(np.float32)
    tokens, log_probs, _ = draws(logits, Sampling(), 2048, chunk=64)
    check_frequencies(tokens, log_softmax(logits))
    np.testing.assert_allclose(log_probs, log_softmax(logits)[tokens], atol=1e-5)


def test_one_token_vocabulary():
    tokens, log_probs, _ = draws(np.zeros(1, np.float32), Sampling(), 64)
    assert not tokens.any() and not log_probs.any()


def test_excluded_tokens_are_never_drawn():
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1, 600).astype(np.float32)
    logits[rng.random(600) < 0.7] = -np.inf
    logits[:40] = logits[-40:] = -np.inf  # whole blocks at both ends too
    tokens, log_probs, _ = draws(logits, Sampling(), 20480)
    check_frequencies(tokens, log_softmax(logits))
    assert np.isfinite(log_probs).all()


@pytest.mark.parametrize("uniform", [0.0, 1e-7, 0.5, 1 - 2**-24, 1.0])
def test_inversion_never_selects_mass_zero(uniform):
    """At the ends of the unit interval, and where rounding of the sum stops it from growing."""
    mass = np.zeros((4, 50), np.float32)
    mass[0, [7, 9]] = 1.0
    mass[1, 20:30] = np.float32(1e-30)
    mass[2, 10], mass[2, 40] = 1.0, np.float32(1e-12)  # 1 + 1e-12 = 1 in float32
    mass[3, 49] = 5.0
    chosen = np.asarray(_sampling._invert(jnp.asarray(mass), jnp.full(4, uniform, jnp.float32)))
    assert (mass[np.arange(4), chosen] > 0).all()


def test_rare_tokens_are_reachable():
    """Probabilities near 2^-15 in a flat vocabulary: the two levels leave no holes."""
    vocab = 1 << 15
    tokens, _, _ = draws(np.zeros(vocab, np.float32), Sampling(), 32768, chunk=256)
    seen = len(set(tokens.tolist()))
    expected = vocab * (1 - np.exp(-1))
    assert abs(seen - expected) < 5 * np.sqrt(vocab * np.exp(-1) * (1 - np.exp(-1)))


@pytest.mark.parametrize("scale", [0.05, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.9, 0.999])
def test_nucleus_is_that_of_a_sort(scale, top_p):
    logits = np.random.default_rng(3).normal(0, scale, (64, 700)).astype(np.float32)
    kept = np.isfinite(np.asarray(_sampling.truncate(jnp.asarray(logits), Sampling(top_p=top_p))))
    compared = 0
    for row, got in zip(np.exp(log_softmax(logits)), kept, strict=True):
        expected, margin = nucleus(row, top_p)
        if margin > 2e-6:  # else float32 may decide either way
            np.testing.assert_array_equal(got, expected)
            compared += 1
    assert compared > 48


def test_nucleus_keeps_ties():
    probs = jnp.array([[0.4, 0.2, 0.2, 0.2]])
    kept = jnp.isfinite(_sampling.truncate(jnp.log(probs), Sampling(top_p=0.5)))
    assert kept.all()


def test_nucleus_of_one():
    probs = jnp.array([[0.1, 0.8, 0.1], [1.0, 0.0, 0.0]])
    kept = jnp.isfinite(_sampling.truncate(jnp.log(probs), Sampling(top_p=0.75)))
    np.testing.assert_array_equal(kept, [[False, True, False], [True, False, False]])


def test_each_cut_works_on_what_the_one_before_left():
    probs = np.array([0.4, 0.3, 0.1, 0.1, 0.1])  # top-2 renormalised: 0.571, 0.429
    logits = jnp.log(jnp.asarray(probs, jnp.float32))[None]
    kept = jnp.isfinite(_sampling.truncate(logits, Sampling(top_k=2, top_p=0.55)))
    np.testing.assert_array_equal(kept[0], [True, False, False, False, False])
    kept = jnp.isfinite(_sampling.truncate(logits, Sampling(top_p=0.55)))
    np.testing.assert_array_equal(kept[0], [True, True, False, False, False])


def test_greedy():
    logits = np.random.default_rng(4).normal(0, 3, (8, 90)).astype(np.float32)
    logits[0, [3, 70]] = 50.0  # a tie goes to the first
    keys = jax.random.split(jax.random.key(0), 8)
    tokens, log_probs, sampled = jitted(logits, keys, Sampling(temperature=0, top_k=3, top_p=0.5))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(log_probs, log_softmax(logits).max(-1), atol=1e-5)
    assert tokens.dtype == jnp.int32 and not sampled.any()


@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_row_depends_on_its_logits_and_key_alone(name):
    logits = np.random.default_rng(5).normal(0, 2, (32, 100)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 32)
    tokens = np.asarray(jitted(logits, keys, LAWS[name])[0])
    order = np.random.default_rng(6).permutation(32)
    np.testing.assert_array_equal(jitted(logits[order], keys[order], LAWS[name])[0], tokens[order])
    np.testing.assert_array_equal(jitted(logits[5:7], keys[5:7], LAWS[name])[0], tokens[5:7])
    other = jitted(logits, jax.random.split(jax.random.key(2), 32), LAWS[name])[0]
    assert (np.asarray(other) != tokens).any()


@pytest.mark.parametrize("temperature", [1e-4, 100.0])
def test_extreme_temperatures(temperature):
    logits = np.random.default_rng(7).normal(0, 20, (16, 100)).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 16)
    tokens, log_probs, sampled = jitted(logits, keys, Sampling(temperature=temperature, top_p=0.9))
    assert np.isfinite(log_probs).all() and np.isfinite(sampled).all()
    if temperature < 1:
        np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_bfloat16_logits():
    logits = jnp.asarray(np.random.default_rng(8).normal(0, 2, 300), jnp.bfloat16)
    tokens, log_probs, _ = draws(logits, Sampling(), 4096)
    expected = log_softmax(np.asarray(logits.astype(jnp.float32)))
    assert log_probs.dtype == np.float32
    np.testing.assert_allclose(log_probs, expected[tokens], atol=1e-5)


def test_broken_logits_give_a_token_of_the_vocabulary():
    logits = jnp.full((3, 300), jnp.nan).at[1].set(jnp.inf).at[2].set(-jnp.inf)
    tokens, log_probs, _ = jitted(logits, jax.random.split(jax.random.key(0), 3), Sampling())
    assert ((tokens >= 0) & (tokens < 300)).all() and np.isnan(log_probs).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(temperature=-1.0), "temperature must be finite and >= 0, got -1.0"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=float("inf")), "temperature"),
        (dict(top_k=-1), "top_k"),
        (dict(top_k=1.5), "top_k must be an integer"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.1), "top_p must be in"),
        (dict(min_p=-0.1), "min_p"),
        (dict(min_p=2.0), "min_p must be in"),
    ],
)
def test_wrong_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**bad)
