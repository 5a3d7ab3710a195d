"""Aggregation, position and token weights, and what GRPO and DAPO need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import losses


@pytest.fixture
def mask():
    lengths = np.array([5, 2, 0, 7, 1, 3])
    return np.arange(7) < lengths[:, None]


def test_aggregation(mask):
    loss = np.random.default_rng(0).normal(size=mask.shape)
    token = losses.aggregation_weights(mask, "token")
    np.testing.assert_allclose((token * loss).sum(), loss[mask].mean(), rtol=1e-5)
    sequence = losses.aggregation_weights(mask, "sequence")
    means = [row[m].mean() for row, m in zip(loss, mask, strict=True) if m.any()]
    np.testing.assert_allclose((sequence * loss).sum(), np.mean(means), rtol=1e-5)
    constant = losses.aggregation_weights(mask, "constant", max_length=10)
    np.testing.assert_allclose((constant * loss).sum(), loss[mask].sum() / 50, rtol=1e-5)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_micro_batches_change_nothing(mask, how):
    """Prompt and padding tokens weigh exactly 0, and the parts add up to the whole."""
    options = dict(max_length=10) if how == "constant" else {}
    whole = losses.aggregation_weights(mask, how, **options)
    assert not np.asarray(whole)[~mask].any()
    counts = dict(tokens=mask.sum(), sequences=mask.any(1).sum())
    for size in (1, 2, 3):
        parts = [
            losses.aggregation_weights(mask[i : i + size], how, **counts, **options)
            for i in range(0, 6, size)
        ]
        np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-6)


def test_aggregation_of_nothing_and_wrong_options(mask):
    for how in ("token", "sequence"):
        assert not losses.aggregation_weights(np.zeros_like(mask), how).any()
    with pytest.raises(ValueError, match="token, sequence, constant"):
        losses.aggregation_weights(mask, "mean")
    for options in (
        dict(how="constant"),
        dict(how="token", max_length=3),
        dict(how="constant", max_length=0),
    ):
        with pytest.raises(ValueError, match="max_length"):
            losses.aggregation_weights(mask, **options)


def test_dr_grpo_advantages():
    rewards = np.random.default_rng(0).normal(size=12)
    expected = (rewards.reshape(3, 4) - rewards.reshape(3, 4).mean(1, keepdims=True)).reshape(-1)
    received = losses.group_advantages(rewards, 4, normalise=False)
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)


def test_informative_groups():
    received = losses.informative_groups([1, 1, 1, 0, 0, 0, 0, 1, 0.5], 3)
    np.testing.assert_array_equal(received, [0, 0, 0, 0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="divide"):
        losses.informative_groups([1, 0, 1], 2)


def test_overlong_penalty():
    lengths = [0, 80, 85, 90, 100, 101, 500]
    np.testing.assert_allclose(losses.overlong_penalty(lengths, 100, 20), [0, 0, -0.25, -0.5, -1, -1, -1])
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="buffer"):
            losses.overlong_penalty(lengths, 100, buffer)


def test_prefix_drift_weights():
    advantages = np.random.default_rng(0).normal(size=(3, 6))
    where = np.arange(6) < np.array([[6], [3], [0]])
    for gamma in (0.0, 0.5, 2.0):
        expected = np.zeros((3, 6))
        for i, t in np.argwhere(where):
            row = np.abs(advantages[i]) * where[i]
            expected[i, t] = 1 + gamma * (1 - row[:t].sum() / row.sum())
        broken = jnp.asarray(np.where(where, advantages, np.nan), jnp.float32)
        received = losses.prefix_drift_weights(broken, gamma, where)
        np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(losses.prefix_drift_weights(jnp.zeros((1, 3))), np.ones((1, 3)))
    slope = jax.grad(lambda a: losses.prefix_drift_weights(a).sum())(jnp.asarray(advantages))
    assert not slope.any()
    with pytest.raises(ValueError, match="strength"):
        losses.prefix_drift_weights(advantages, -1.0)


def test_high_entropy():
    entropies = np.random.default_rng(0).permutation(20).reshape(4, 5).astype(np.float32)
    where = np.ones((4, 5), bool)
    for fraction, kept in ((0.2, 4), (0.21, 5), (1.0, 20), (1e-3, 1)):
        chosen = np.asarray(losses.high_entropy(entropies, fraction))
        np.testing.assert_array_equal(chosen, entropies >= 20 - kept)
    where[entropies >= 15] = False
    chosen = np.asarray(losses.high_entropy(entropies, 0.2, where))
    np.testing.assert_array_equal(chosen, (entropies >= 12) & where)
    assert not losses.high_entropy(entropies, 0.5, np.zeros((4, 5))).any()
    for fraction in (0.0, 1.1):
        with pytest.raises(ValueError, match="fraction"):
            losses.high_entropy(entropies, fraction)


def test_loss_mask(mask):
    tool = np.zeros_like(mask)
    tool[:, 1] = True
    np.testing.assert_array_equal(losses.loss_mask(mask, excluded=tool), mask & ~tool)
    truncated = np.array([1, 0, 1, 1, 0, 0], bool)
    np.testing.assert_array_equal(losses.loss_mask(mask, truncated=truncated), mask & ~truncated[:, None])
    tail = np.asarray(losses.loss_mask(mask, truncated=truncated, tail=2))
    np.testing.assert_array_equal(tail.sum(1), [3, 2, 0, 5, 1, 3])
    assert not (tail & ~mask).any() and tail[0, :3].all()
    np.testing.assert_array_equal(losses.loss_mask(mask), mask)
    for options in (dict(tail=1), dict(truncated=truncated, tail=-1)):
        with pytest.raises(ValueError, match="tail"):
            losses.loss_mask(mask, **options)


def test_overlap_and_stop():
    student = np.random.default_rng(0).normal(size=(2, 9, 40)).astype(np.float32)
    teacher = student + np.linspace(0, 6, 9)[:, None] * np.random.default_rng(1).normal(size=(2, 9, 40))
    overlap = np.asarray(losses.top_k_overlap(student, teacher.astype(np.float32)))
    tops = [np.argsort(-a, axis=-1)[..., :16] for a in (student, teacher)]
    expected = [
        [len(set(a) & set(b)) / 16 for a, b in zip(*rows, strict=True)] for rows in zip(*tops, strict=True)
    ]
    np.testing.assert_allclose(overlap, expected)
    where = np.arange(9) < np.array([[9], [6]])
    for window in (1, 2, 4, 20):
        for threshold in (0.0, 0.5, 0.7, 1.0):
            lengths = []
            for row, count in zip(overlap, (9, 6), strict=True):
                stops = [
                    t + 1
                    for t in range(window - 1, count)
                    if row[t - window + 1 : t + 1].mean() < threshold - 1e-6
                ]
                lengths.append(stops[0] if stops else count)
            received = losses.overlap_stop(overlap, window, threshold - 1e-6 if threshold else 0.0, where)
            np.testing.assert_array_equal(received, lengths)
    for options in (dict(window=0, threshold=0.5), dict(window=1, threshold=1.5)):
        with pytest.raises(ValueError, match="window must be"):
            losses.overlap_stop(overlap, **options)
