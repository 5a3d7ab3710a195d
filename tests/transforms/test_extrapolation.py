"""The pure functions of EffOPD against hand-worked cases."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.transforms import extrapolation as ex

ANCHOR = {"up": jnp.array([[0.0]]), "norm": {"scale": jnp.array([1.0])}}
PARAMS = {"up": jnp.array([[1.0]]), "norm": {"scale": jnp.array([2.0])}}


def parabola(params):
    """Best at 5.5."""
    return -jnp.sum((params["up"] - 5.5) ** 2)


class Recorded:
    """A score that plays back what a run recorded, and keeps what it was asked about."""

    def __init__(self, *scores):
        self.scores, self.seen = list(scores), []

    def __call__(self, params):
        self.seen.append(float(params["up"][0, 0]))
        return self.scores.pop(0)


def test_propose():
    moved = ex.propose(ANCHOR, PARAMS, 4.0)
    assert moved["up"] == 5.0  # 1 + 4 (1 - 0)
    assert moved["norm"]["scale"] is PARAMS["norm"]["scale"]


def test_propose_moves_what_the_mask_names():
    moved = ex.propose(ANCHOR, PARAMS, 4.0, {"up": False, "norm": {"scale": True}})
    assert moved["up"] is PARAMS["up"]
    assert moved["norm"]["scale"] == 6.0
    everything = ex.propose(ANCHOR, PARAMS, 4.0, lambda params: jax.tree.map(lambda _: True, params))
    assert everything["up"] == 5.0 and everything["norm"]["scale"] == 6.0


def test_propose_computes_in_float32():
    """193/128 + 10 (65/128) = 843/128, held as 844/128; a bfloat16 product would give 840/128."""
    start, end = jnp.full((1, 1), 1, jnp.bfloat16), jnp.full((1, 1), 193 / 128, jnp.bfloat16)
    moved = ex.propose({"up": start}, {"up": end}, 10.0)["up"]
    assert moved.dtype == jnp.bfloat16 and moved == 844 / 128
    assert end + jnp.bfloat16(10) * (end - start) == 840 / 128


def test_propose_under_jit_with_a_traced_factor():
    moved = jax.jit(ex.propose)(ANCHOR, PARAMS, jnp.float32(10))
    assert moved["up"] == 11.0 and moved["norm"]["scale"] == 2.0


def test_propose_bad_input():
    with pytest.raises(ValueError, match=r"nothing moves among the 2 parameters \(norm.scale, up\)"):
        ex.propose(ANCHOR, PARAMS, 2.0, {"up": None, "norm": {"scale": False}})
    with pytest.raises(ValueError, match="must be a tree like the parameters"):
        ex.propose(ANCHOR, PARAMS, 2.0, {"up": True})
    with pytest.raises(ValueError, match="the anchor has 1 leaves"):
        ex.propose({"up": jnp.zeros((1, 1))}, PARAMS, 2.0)
    with pytest.raises(ValueError, match=r"bfloat16\[1, 1\] where .* float32\[1, 1\], at up"):
        ex.propose(ANCHOR | {"up": jnp.zeros((1, 1), jnp.bfloat16)}, PARAMS, 2.0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("powers_of_two", [1, 2, 4, 8, 16, 32]),
        (1, list(range(1, 41))),
        (15, [15, 30]),
        ((3, 10, 39), [3, 10, 39]),
        ([7], [7]),
        (range(5, 20, 5), [5, 10, 15]),
    ],
)
def test_schedule(schedule, expected):
    assert [step for step in range(41) if ex.is_checkpoint(step, schedule)] == expected
    assert ex.is_checkpoint(np.int64(expected[0]), schedule) is True
    due = jax.jit(lambda step: ex.is_checkpoint(step, schedule))(jnp.arange(41))
    assert due.dtype == bool and np.flatnonzero(due).tolist() == expected


@pytest.mark.parametrize("schedule", ["powers", 0, -2, (), (0, 1), (1.5,), 2.0, True, None])
def test_bad_schedule(schedule):
    with pytest.raises(ValueError, match="schedule must be"):
        ex.is_checkpoint(1, schedule)


def test_rules_at_a_tie():
    for scores in (0.5, np.array([1.0, 0.0])):
        assert ex.accepts("paper", scores, scores)
        assert not ex.accepts("reference", scores, scores)
    assert not ex.accepts("margin", np.array([1.0, 0.0]), np.array([1.0, 0.0]))
    assert ex.accepts("reference", 0.51, 0.5) and not ex.accepts("paper", 0.49, 0.5)


def test_margin_is_a_paired_test():
    """d = .1 .2 .3 .4: mean .25, deviation sqrt(.05 / 3) = .12910, standard error .06455, ratio 3.873."""
    best = np.array([5.0, -3.0, 0.0, 100.0])
    candidate = best + np.array([0.1, 0.2, 0.3, 0.4])
    assert ex.accepts("margin", candidate, best, 3.8) and not ex.accepts("margin", candidate, best, 3.95)
    # Of 50 answers 3 became right and 1 wrong: mean .04, standard error sqrt((4 - 50 .04^2) / 49 / 50) = .04.
    best, candidate = np.zeros(50), np.zeros(50)
    candidate[:3], best[3] = 1, 1
    assert not ex.accepts("margin", candidate, best) and ex.accepts("margin", candidate, best, 0.99)
    assert ex.accepts("reference", candidate, best)


@pytest.mark.parametrize("rule", ["paper", "reference", "margin"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(rule, bad):
    good, failed = np.array([0.0, 0.5]), np.array([1.0, bad])
    assert not ex.accepts(rule, failed, good)
    assert not ex.accepts(rule, good, failed)


def test_accepts_bad_input():
    with pytest.raises(ValueError, match="got 'best'"):
        ex.accepts("best", 1.0, 0.0)
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        ex.accepts("paper", np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"scalars or \[n\]"):
        ex.accepts("paper", np.zeros((2, 2)), np.zeros((2, 2)))
    for scores in (np.float32(1), np.zeros(1)):
        with pytest.raises(ValueError, match="at least 2 examples"):
            ex.accepts("margin", scores, scores)


def test_search_of_a_parabola():
    """Candidates 3, 5, 7 at scores -6.25, -.25, -2.25: the third fails, the others are not tried."""
    found = ex.search(parabola, PARAMS, ANCHOR)
    assert (found.factor, found.factors, found.accepted) == (4.0, (2.0, 4.0, 6.0), 2)
    assert found.scores == (-20.25, -6.25, -0.25, -2.25)
    assert (found.failed, found.evaluated, found.stopped) == (0, 4, "score")
    assert found.params["up"] == 5.0 and found.params["norm"]["scale"] is PARAMS["norm"]["scale"]


def test_search_to_the_last_factor():
    found = ex.search(lambda p: p["up"].sum(), PARAMS, ANCHOR)
    assert (found.factor, found.accepted, found.evaluated, found.stopped) == (10.0, 5, 6, "")


def test_nothing_accepted_is_the_very_same_object():
    found = ex.search(lambda p: -abs(p["up"] - 1).sum(), PARAMS, ANCHOR)
    assert found.params is PARAMS
    assert (found.factor, found.factors, found.accepted, found.evaluated) == (0.0, (2.0,), 0, 2)


def test_recorded_scores_by_each_rule():
    """The same scores; a tie ends the reference rule's search."""
    record = (0.40, 0.44, 0.44, 0.50, 0.48)
    score = Recorded(*record)
    found = ex.search(score, PARAMS, ANCHOR, rule="paper")
    assert found.factor == 6.0 and score.seen == [1, 3, 5, 7, 9]
    score = Recorded(*record)
    found = ex.search(score, PARAMS, ANCHOR, rule="reference")
    assert found.factor == 2.0 and score.seen == [1, 3, 5]
    np.testing.assert_allclose(found.scores, record[:3], rtol=1e-6)


def test_a_recorded_run_by_the_reference_rule():
    """Steps of +1, searches at 1, 2, 4; each anchor is what the search before it accepted.

    1: W 1, anchor 0, candidates 3 ok, 5 ok, 7 no -> 5. 2: W 6, anchor 5, candidate 8 no -> 6.
    4: W 8, anchor 6, candidates 12 ok, 16 ok, 20 ok, 24 ok, 28 ok -> 28.
    """
    score = Recorded(0.3, 0.4, 0.5, 0.5, 0.45, 0.44, 0.4, 0.42, 0.44, 0.46, 0.48, 0.5)
    params = anchor = {"up": jnp.zeros((1, 1))}
    factors = []
    for step in range(1, 5):
        params = {"up": params["up"] + 1}
        if ex.is_checkpoint(step):
            found = ex.search(score, params, anchor, rule="reference")
            params = anchor = found.params
            factors.append(found.factor)
    assert factors == [4.0, 0.0, 10.0] and params["up"] == 28
    assert score.seen == [1, 3, 5, 7, 6, 8, 8, 12, 16, 20, 24, 28]


def test_a_score_that_is_not_finite_ends_the_search():
    found = ex.search(Recorded(0.1, 0.2, math.nan, 0.9), PARAMS, ANCHOR)
    assert (found.factor, found.failed, found.stopped) == (2.0, 1, "not finite")
    assert math.isnan(found.scores[-1])
    score = Recorded(math.nan, 0.5)
    found = ex.search(score, PARAMS, ANCHOR)
    assert found.params is PARAMS and score.seen == [1.0]
    assert (found.failed, found.evaluated, found.factors) == (1, 1, ())


def test_margin_rule_compares_with_the_accepted_scores():
    start, first = np.array([0.0, 0.0, 0.0, 0.0]), np.array([0.3, 0.2, 0.3, 0.2])
    second = first + np.array([0.5, -0.4, 0.0, 0.0])  # mean up by .025 and by noise only
    found = ex.search(Recorded(start, first, second), PARAMS, ANCHOR, rule="margin")
    assert (found.factor, found.accepted, found.stopped) == (2.0, 1, "score")
    np.testing.assert_allclose(found.scores, [0, 0.25, 0.275], rtol=1e-6)


def test_trust_bound():
    """A squared distance from W stands for the KL: 4, 16, 36."""

    def distance(params, candidate):
        return jnp.sum((candidate["up"] - params["up"]) ** 2)

    score = Recorded(0.1, 0.2, 0.3)
    found = ex.search(score, PARAMS, ANCHOR, max_kl=20.0, divergence=distance)
    assert (found.factor, found.factors, found.stopped, found.failed) == (
        4.0,
        (2.0, 4.0, 6.0),
        "divergence",
        0,
    )
    assert score.seen == [1, 3, 5] and found.evaluated == 3 and math.isnan(found.scores[-1])
    found = ex.search(parabola, PARAMS, ANCHOR, max_kl=20.0, divergence=lambda *_: math.nan)
    assert found.params is PARAMS and (found.failed, found.stopped) == (1, "not finite")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "best"}, "rule must be"),
        ({"factors": ()}, "factors must be"),
        ({"factors": (2.0, 0.0)}, "factors must be"),
        ({"factors": (2.0, math.inf)}, "factors must be"),
        ({"margin": -1.0}, "margin must be"),
        ({"max_kl": 0.1}, "belong together"),
        ({"divergence": parabola}, "belong together"),
        ({"max_kl": 0.0, "divergence": parabola}, "max_kl must be > 0"),
    ],
)
def test_search_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        ex.search(parabola, PARAMS, ANCHOR, **changes)
