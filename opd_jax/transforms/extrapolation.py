"""EffOPD's directional extrapolation as pure functions: when to search, what to propose, what to accept.

`opd_jax.transforms.extrapolate` does the same inside an optax chain; `search` here runs on the host, where a
score may sample, call a verifier or read a clock.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from opd_jax.transforms._matrices import Matrices, block_matrices, path_name

FACTORS = (2.0, 4.0, 6.0, 8.0, 10.0)
"""The paper's: 2k, k = 1..5."""

Rule = Literal["paper", "reference", "margin"]
Schedule = Literal["powers_of_two"] | int | Sequence[int]


class Search(NamedTuple):
    """What `search` found.

    Attributes:
        params: those to go on with; the very object that was passed in if nothing was accepted.
        factor: of the accepted candidate; 0.0 if none.
        factors: those tried, in order.
        scores: means, of the start and of each factor tried; NaN where the divergence ruled it out unscored.
        accepted: candidates accepted, one after the other.
        failed: scores and divergences that were not finite.
        evaluated: calls of the score.
        stopped: "score", "not finite" or "divergence"; "" if no candidate failed.
    """

    params: Any
    factor: float
    factors: tuple[float, ...]
    scores: tuple[float, ...]
    accepted: int
    failed: int
    evaluated: int
    stopped: str


def propose(anchor: Any, params: Any, factor: ArrayLike, matrices: Matrices = None) -> Any:
    r"""The parameters moved further along the line from an anchor.

    .. math:: \tilde W = W + f\, (W - W_\mathrm{anchor})

    Args:
        anchor: a tree with the leaves of `params`.
        params: W, any tree of arrays.
        factor: f, a scalar; may be traced.
        matrices: which leaves move, a tree like `params` or a function that makes one: None or False stays,
            all else moves (vectors, too). Default: `block_matrices`, which leaves out embeddings, norms and
            biases, as the reference code does.

    Returns:
        A tree like `params`: what moves computed in float32 and cast to its dtype, the rest as it is.

    Raises:
        ValueError: if nothing moves, or the anchor's leaves have other shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> before = {"up": {"kernel": jnp.zeros((1, 2))}, "norm": {"scale": jnp.zeros(2)}}
        >>> after = {"up": {"kernel": jnp.array([[1.0, -2.0]])}, "norm": {"scale": jnp.ones(2)}}
        >>> moved = propose(before, after, 2.0)
        >>> print(moved["up"]["kernel"], moved["norm"]["scale"])
        [[ 3. -6.]] [1. 1.]

    References:
        Cai et al., `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    moving = _moving(params, matrices, "propose")
    leaves, treedef = jax.tree.flatten(params)
    starts = _leaves_like(anchor, params, "propose: the anchor")
    return jax.tree.unflatten(treedef, _proposed(starts, leaves, factor, moving))


def _proposed(anchor: list, leaves: list, factor: ArrayLike, moving: Sequence[bool]) -> list:
    """`propose` on lists of leaves."""
    chosen = [i for i, moves in enumerate(moving) if moves]
    moved = _moved([anchor[i] for i in chosen], [leaves[i] for i in chosen], factor)
    leaves = list(leaves)
    for i, leaf in zip(chosen, moved, strict=True):
        leaves[i] = leaf
    return leaves


@jax.jit
def _moved(anchor: list, leaves: list, factor: ArrayLike) -> list:
    def one(start, leaf):
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        start, end = start.astype(wide), leaf.astype(wide)
        return (end + jnp.asarray(factor, wide) * (end - start)).astype(leaf.dtype)

    return [one(start, leaf) for start, leaf in zip(anchor, leaves, strict=True)]


def _moving(params: Any, matrices: Matrices, who: str) -> tuple[bool, ...]:
    """Which leaves move; unlike for `select`, a leaf need not be a matrix if the caller names it."""
    matrices = block_matrices if matrices is None else matrices
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    try:
        marks = treedef.flatten_up_to(matrices(params) if callable(matrices) else matrices)
    except ValueError as error:
        raise ValueError(f"{who}: `matrices` must be a tree like the parameters: {error}") from None
    found = []
    for (_, leaf), mark in zip(flat, marks, strict=True):
        wanted = mark is not None and not (isinstance(mark, bool | np.bool_) and not mark)
        found.append(wanted and jnp.issubdtype(leaf.dtype, jnp.inexact))
    if not any(found):
        names = ", ".join(path_name(path) for path, _ in flat[:8])
        raise ValueError(
            f"{who}: nothing moves among the {len(flat)} parameters ({names}{', ...' * (len(flat) > 8)}); "
            "pass `matrices`, a tree like the parameters with True at what should move"
        )
    return tuple(found)


def _leaves_like(tree: Any, params: Any, what: str) -> list:
    """The leaves of a tree that must have those of `params`; its containers may differ."""
    flat, leaves = jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(tree)
    if len(leaves) != len(flat):
        raise ValueError(f"{what} has {len(leaves)} leaves, the parameters {len(flat)}")
    for (path, leaf), other in zip(flat, leaves, strict=True):
        if (leaf.shape, leaf.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"{what} has {other.dtype}{list(other.shape)} where the parameters have "
                f"{leaf.dtype}{list(leaf.shape)}, at {path_name(path)}"
            )
    return leaves


def is_checkpoint(step: ArrayLike, schedule: Schedule = "powers_of_two") -> Any:
    """Whether to search after this update.

    Args:
        step: updates completed, 1 after the first; an int or an integer array, may be traced.
        schedule: "powers_of_two" (1, 2, 4, 8, ...), an int k (k, 2k, ...), or the steps themselves.

    Returns:
        bool for an int, else a boolean array.

    Raises:
        ValueError: if the schedule is unknown, names no step, or a step below 1.

    Example:
        >>> [step for step in range(1, 20) if is_checkpoint(step)]
        [1, 2, 4, 8, 16]
        >>> [step for step in range(1, 20) if is_checkpoint(step, 6)]
        [6, 12, 18]
    """
    schedule = _checked_schedule(schedule)
    if isinstance(schedule, str):
        due = (step > 0) & ((step & (step - 1)) == 0)
    elif isinstance(schedule, tuple):
        due = step in schedule if _is_int(step) else jnp.isin(step, jnp.array(schedule, jnp.int32))
    else:
        due = (step > 0) & (step % schedule == 0)
    return bool(due) if _is_int(step) and not isinstance(due, jax.Array) else due


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)


def _checked_schedule(schedule: Schedule) -> Any:
    """The schedule as "powers_of_two", a tuple of ints, an int or a scalar array (a hyperparameter)."""
    if isinstance(schedule, str):
        if schedule != "powers_of_two":
            raise ValueError(f"schedule must be 'powers_of_two', an int or ints, got {schedule!r}")
        return schedule
    if isinstance(schedule, jax.Array | np.ndarray) and schedule.ndim == 0:
        return schedule
    steps = (schedule,) if _is_int(schedule) else tuple(schedule) if np.iterable(schedule) else ()
    if not steps or not all(_is_int(step) and step >= 1 for step in steps):
        raise ValueError(f"schedule must be 'powers_of_two', an int >= 1 or ints >= 1, got {schedule!r}")
    return int(schedule) if _is_int(schedule) else tuple(int(step) for step in steps)


def accepts(rule: Rule, candidate: ArrayLike, best: ArrayLike, margin: ArrayLike = 2.0) -> jax.Array:
    r"""Whether a candidate's scores are good enough to go on from it.

    "paper": mean >= best mean. "reference" (the authors' code): mean > best mean. "margin": a paired test on
    the same examples, :math:`\bar d > c\, s_d / \sqrt n` with d = candidate - best.

    Args:
        rule: see above.
        candidate: scores, higher is better: [n], one per example, or a scalar.
        best: those of the best so far, on the same examples in the same order.
        margin: c, in standard errors of the mean difference; only "margin" uses it.

    Returns:
        A boolean scalar; False where a score is not finite.

    Raises:
        ValueError: if the rule is unknown, the shapes differ, or "margin" has not two examples to compare.

    Example:
        >>> import jax.numpy as jnp
        >>> best, candidate = jnp.array([0.0, 0.0, 0.0, 1.0]), jnp.array([1.0, 0.0, 0.0, 1.0])
        >>> bool(accepts("reference", candidate, best)), bool(accepts("margin", candidate, best))
        (True, False)
    """
    _check_rule(rule)
    candidate, best = (jnp.asarray(x, jnp.float32) for x in (candidate, best))
    if candidate.shape != best.shape or candidate.ndim > 1:
        raise ValueError(
            "scores must be scalars or [n], of one shape for every candidate, "
            f"got {candidate.shape} and {best.shape}"
        )
    means = candidate.mean(), best.mean()
    finite = jnp.isfinite(means[0]) & jnp.isfinite(means[1])
    if rule == "paper":
        return finite & (means[0] >= means[1])
    if rule == "reference":
        return finite & (means[0] > means[1])
    if candidate.ndim != 1 or candidate.size < 2:
        raise ValueError(
            f"rule 'margin' needs one score for each of at least 2 examples, got shape {candidate.shape}"
        )
    difference = candidate - best
    error = jnp.std(difference, ddof=1) / math.sqrt(difference.size)
    return finite & (difference.mean() > margin * error)


def _check_rule(rule: str) -> None:
    if rule not in ("paper", "reference", "margin"):
        raise ValueError(f"rule must be 'paper', 'reference' or 'margin', got {rule!r}")


def _check_search(factors: Any, rule: str, margin: Any, max_kl: Any, divergence: Any) -> tuple[float, ...]:
    """The factors, after checking what Python can see; arrays (injected hyperparameters) pass."""
    _check_rule(rule)
    factors = tuple(float(f) for f in factors)
    if not factors or not all(0 < f < math.inf for f in factors):
        raise ValueError(f"factors must be positive and finite, at least one, got {factors}")
    if isinstance(margin, numbers.Real) and not 0 <= margin < math.inf:
        raise ValueError(f"margin must be >= 0 standard errors, got {margin}")
    if (max_kl is None) != (divergence is None):
        raise ValueError("max_kl and divergence belong together: pass both or neither")
    if isinstance(max_kl, numbers.Real) and not max_kl > 0:
        raise ValueError(f"max_kl must be > 0 nats, got {max_kl}")
    return factors


def search(
    score: Callable[[Any], ArrayLike],
    params: Any,
    anchor: Any,
    *,
    factors: Sequence[float] = FACTORS,
    rule: Rule = "paper",
    margin: float = 2.0,
    matrices: Matrices = None,
    max_kl: float | None = None,
    divergence: Callable[[Any, Any], ArrayLike] | None = None,
) -> Search:
    r"""Tries candidates one after the other, each against the best before it, until one fails.

    .. math:: \tilde W_k = W + f_k\, (W - W_\mathrm{anchor}), \qquad
        \text{accepted while } V(\tilde W_k) \ge V(W_\mathrm{acc})

    Runs on the host. The start is scored anew at each call, by the same score as its candidates: that is what
    keeps one lucky draw from blocking later searches. A score that draws samples should draw with the same
    random numbers at every call. A start whose score is not finite accepts nothing.

    Args:
        score: params -> scalar or [n] per-example scores, higher is better; any Python.
        params: W, after the step.
        anchor: parameters at the previous search (accepted ones in the reference code); W_0 at first.
        factors: of the candidates, in order; > 0.
        rule: see `accepts`.
        margin: see `accepts`.
        matrices: see `propose`.
        max_kl: nats; a candidate that diverges further from `params` fails, unscored.
        divergence: (params, candidate) -> scalar, such as a mean KL of the policies.

    Returns:
        The parameters to go on with, and the record of the search.

    Raises:
        ValueError: if an argument is out of range, nothing moves, or the anchor's leaves have other shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> anchor, params = {"up": jnp.array([[0.0]])}, {"up": jnp.array([[1.0]])}
        >>> found = search(lambda p: -((p["up"] - 5.5) ** 2).sum(), params, anchor)
        >>> found.factor, found.factors, found.accepted, float(found.params["up"][0, 0])
        (4.0, (2.0, 4.0, 6.0), 2, 5.0)

    References:
        Cai et al., `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_, section on EffOPD
    """
    factors = _check_search(factors, rule, margin, max_kl, divergence)
    best = np.asarray(score(params), np.float32)
    scores, tried, failed, evaluated = [float(best.mean())], [], 0, 1
    accepted, factor, count, stopped = params, 0.0, 0, ""
    if not math.isfinite(scores[0]):
        factors, failed, stopped = (), 1, "not finite"
    for current in factors:
        candidate = propose(anchor, params, current, matrices)
        tried.append(current)
        if divergence is not None:
            distance = float(divergence(params, candidate))
            if not distance <= max_kl:
                scores.append(math.nan)
                failed += not math.isfinite(distance)
                stopped = "divergence" if math.isfinite(distance) else "not finite"
                break
        values = np.asarray(score(candidate), np.float32)
        evaluated += 1
        scores.append(float(values.mean()))
        if not accepts(rule, values, best, margin):
            failed += not math.isfinite(scores[-1])
            stopped = "score" if math.isfinite(scores[-1]) else "not finite"
            break
        best, accepted, factor, count = values, candidate, current, count + 1
    return Search(accepted, factor, tuple(tried), tuple(scores), count, failed, evaluated, stopped)
