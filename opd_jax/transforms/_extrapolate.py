"""EffOPD as an optax transform: a search along the line of recent progress, inside `update`."""

import functools
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from opd_jax.transforms._matrices import Matrices
from opd_jax.transforms.extrapolation import (
    FACTORS,
    Rule,
    Schedule,
    _check_search,
    _checked_schedule,
    _is_int,
    _leaves_like,
    _moving,
    _proposed,
    accepts,
    is_checkpoint,
)


class ExtrapolateState(NamedTuple):
    """State of `extrapolate`; K factors.

    Attributes:
        extrapolate_count: updates seen, [] int32.
        extrapolate_anchor: where the next search's line begins, a tree like the parameters.
        extrapolate_factor: accepted by the last search, 0 if none, [] float32.
        extrapolate_scores: mean scores of the last search, the start's first, [K + 1] float32; NaN where a
            candidate was not tried or not within `max_kl`.
        extrapolate_searches: [] int32.
        extrapolate_accepted: candidates accepted in all searches, [] int32.
        extrapolate_failures: scores and divergences that were not finite, in all searches, [] int32.
        extrapolate_evaluations: of the score, in all searches, [] int32.
    """

    extrapolate_count: jax.Array
    extrapolate_anchor: Any
    extrapolate_factor: jax.Array
    extrapolate_scores: jax.Array
    extrapolate_searches: jax.Array
    extrapolate_accepted: jax.Array
    extrapolate_failures: jax.Array
    extrapolate_evaluations: jax.Array


class _Options(NamedTuple):
    factors: tuple[float, ...]
    rule: Rule
    margin: ArrayLike
    max_kl: ArrayLike | None
    batched: bool
    anchor: str


class _Found(NamedTuple):
    """The carry of a search, and what it found; names as in the state."""

    tried: jax.Array  # [] int32
    going: jax.Array  # [] bool
    best: jax.Array  # scores of the accepted, [] or [n] float32
    factor: jax.Array
    scores: jax.Array
    accepted: jax.Array
    failures: jax.Array


def extrapolate(
    score_fn: Callable[..., ArrayLike] | None = None,
    *,
    factors: Sequence[float] = FACTORS,
    schedule: Schedule = "powers_of_two",
    rule: Rule = "paper",
    margin: ArrayLike = 2.0,
    matrices: Matrices = None,
    anchor: Literal["accepted", "raw"] = "accepted",
    batched: bool = False,
    max_kl: ArrayLike | None = None,
    divergence_fn: Callable[..., ArrayLike] | None = None,
    micro_steps: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""EffOPD: at steps 1, 2, 4, 8, ..., jumps ahead along the progress since the last jump if that scores.

    .. math:: \tilde W_k = W_t + f_k\, (W_t - W_\mathrm{anchor}), \qquad W_t = W_{t-1} + u_t

    Candidates are scored in order, each against the best before it, until one fails. If none is accepted the
    updates pass as they came, bit for bit. (A compiled step that also applies them may still differ in the
    last bit from one without this transform: there XLA contracts the optimiser's last product and the sum
    into one operation. Where two programs must agree to the bit, apply updates in a program of its own, or
    use `extrapolation.search`.) Place it last in a chain: it needs the updates that will be applied. All is
    compiled once; between searches nothing is scored.

    The state holds one copy of the parameters, sharded as they are. Moments of the optimiser are kept, as in
    the reference code; to reset them after a jump, replace the optimiser's own state by a fresh one on the
    host when `extrapolate_factor` is above 0. Initialise it with the parameters themselves: from a
    `ShapeDtypeStruct` outside `eval_shape` the anchor is NaN, with which a search accepts nothing.

    With accumulation put `MultiSteps` inside, `chain(MultiSteps(adamw(lr), k).gradient_transformation(),
    extrapolate(..., micro_steps=k))`; around the chain it works too, but repeats each search k times. Under
    `inject_hyperparams` functions are static: `static_args=("score_fn", "matrices", "divergence_fn")`.

    Args:
        score_fn: (params, **kwargs) -> scalar or [n] per-example scores, higher is better; traceable. Its
            keyword arguments are taken by name from the extra arguments of `update`. It may also be given
            there, as `score_fn`, which goes before this one.
        factors: f_k, > 0, in order of trial.
        schedule: see `extrapolation.is_checkpoint`.
        rule: see `extrapolation.accepts`.
        margin: see `extrapolation.accepts`.
        matrices: which leaves move; see `extrapolation.propose`.
        anchor: "accepted": the parameters after the previous search (reference code); "raw": those before its
            jump.
        batched: score all candidates at once, under vmap. Same rule and outcome; memory for K + 1 copies of
            what moves, and no early stop.
        max_kl: nats; a candidate that diverges further from W_t fails.
        divergence_fn: (params, candidate, **kwargs) -> scalar, such as a mean KL of the policies; traceable.
            Keyword arguments as for `score_fn`.
        micro_steps: calls of `update` that make one step of the schedule.

    Returns:
        The transform; `update` requires `params`.

    Raises:
        ValueError: if an argument is out of range; from `init` if nothing moves; from `update` without
            params or a score, or if the parameters are not those of `init`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> score = lambda params: -jnp.sum((params["up"] - 5.5) ** 2)
        >>> tx = optax.chain(optax.sgd(1.0), extrapolate(score))
        >>> params = {"up": jnp.zeros((1, 1))}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"up": -jnp.ones((1, 1))}, state, params)  # 0 + 1 + 4 * (1 - 0)
        >>> print(optax.apply_updates(params, updates)["up"], optax.tree.get(state, "extrapolate_factor"))
        [[5.]] 4.0

    References:
        Cai et al., `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    factors = _check_search(factors, rule, margin, max_kl, divergence_fn)
    options = _Options(factors, rule, margin, max_kl, batched, anchor)
    schedule = _checked_schedule(schedule)
    if anchor not in ("accepted", "raw"):
        raise ValueError(f"anchor must be 'accepted' or 'raw', got {anchor!r}")
    if isinstance(micro_steps, numbers.Real) and not (_is_int(micro_steps) and micro_steps >= 1):
        raise ValueError(f"micro_steps must be an int >= 1, got {micro_steps!r}")
    for name, function in (("score_fn", score_fn), ("divergence_fn", divergence_fn)):
        if function is not None and not callable(function):
            raise ValueError(f"{name} must be a function, got {function!r}")

    def init(params):
        if jax.tree.leaves(params):
            _moving(params, matrices, "extrapolate")
        return ExtrapolateState(
            extrapolate_count=jnp.zeros([], jnp.int32),
            extrapolate_anchor=jax.tree.map(_copy, params),
            extrapolate_factor=jnp.zeros([], jnp.float32),
            extrapolate_scores=jnp.full([len(factors) + 1], jnp.nan, jnp.float32),
            extrapolate_searches=jnp.zeros([], jnp.int32),
            extrapolate_accepted=jnp.zeros([], jnp.int32),
            extrapolate_failures=jnp.zeros([], jnp.int32),
            extrapolate_evaluations=jnp.zeros([], jnp.int32),
        )

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("extrapolate needs the parameters: pass `params` when calling `update`")
        score = extra_args.get("score_fn")
        score = score_fn if score is None else score
        if score is None:
            raise ValueError("extrapolate has no score: pass `score_fn` to it or to `update`")
        state = state._replace(extrapolate_count=optax.safe_increment(state.extrapolate_count))
        if not jax.tree.leaves(params):
            return updates, state
        steps, rest = jnp.divmod(state.extrapolate_count, micro_steps)
        due = is_checkpoint(steps, schedule) & (rest == 0)
        score = _bound(score, extra_args, "score_fn", 1)
        divergence = divergence_fn and _bound(divergence_fn, extra_args, "divergence_fn", 2)
        return _update(updates, state, params, due, score, divergence, matrices, options)

    return optax.GradientTransformationExtraArgs(init, update)


def _update(
    updates: Any,
    state: ExtrapolateState,
    params: Any,
    due: jax.Array,
    score: Callable[[Any], ArrayLike],
    divergence: Callable[[Any, Any], ArrayLike] | None,
    matrices: Matrices,
    options: _Options,
) -> tuple[Any, ExtrapolateState]:
    """The updates and the state after a search if one is due; below this, trees are lists of leaves."""
    given, moving = _flat_updates(updates, params, matrices)
    leaves, treedef = jax.tree.flatten(params)
    start = _leaves_like(state.extrapolate_anchor, params, "extrapolate: the state of `init`")

    def evaluate(raw, candidate):
        value = jnp.asarray(score(jax.tree.unflatten(treedef, candidate)), jnp.float32)
        if divergence is None:
            return value, jnp.zeros([], jnp.float32)
        trees = (jax.tree.unflatten(treedef, x) for x in (raw, candidate))
        return value, jnp.asarray(divergence(*trees), jnp.float32)

    out, after, record = jax.lax.cond(
        due,
        lambda: _jump(state, evaluate, (start, leaves, given, moving), options),
        lambda: (given, start, _record(state)),
    )
    # The anchor's containers may be others: nnx.Optimizer wraps all arrays of the state.
    after = jax.tree.unflatten(jax.tree.structure(state.extrapolate_anchor), after)
    return jax.tree.unflatten(treedef, out), state._replace(extrapolate_anchor=after, **record)


def _copy(leaf: Any) -> jax.Array:
    """A buffer of its own: parameters and state may be donated together."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        fill = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
        return jnp.full(leaf.shape, fill, leaf.dtype, device=leaf.sharding)
    return jnp.copy(leaf)


def _bound(function: Callable, extra_args: dict[str, Any], name: str, positional: int) -> Callable:
    """The function with the extra arguments that it names."""
    parameters = list(inspect.signature(function).parameters.values())[positional:]
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = [p.name for p in parameters if p.name in known and p.default is p.empty]
    if missing := [n for n in needed if n not in extra_args]:
        raise ValueError(f"extrapolate: {name} needs {', '.join(missing)}: pass them to `update` by name")
    return functools.partial(function, **{k: v for k, v in extra_args.items() if k in known})


def _flat_updates(updates: Any, params: Any, matrices: Matrices) -> tuple[list, list[bool]]:
    """The updates, one for each leaf of the parameters, and which of these move; one without update stays."""
    try:
        given = jax.tree.structure(params).flatten_up_to(updates)
    except ValueError as error:
        raise ValueError(f"extrapolate: the updates are no tree like the parameters: {error}") from None
    moving = _moving(params, matrices, "extrapolate")
    return given, [moves and u is not None for moves, u in zip(moving, given, strict=True)]


def _record(state: ExtrapolateState) -> dict[str, jax.Array]:
    """All of the state but the count and the anchor."""
    return {k: v for k, v in state._asdict().items() if k not in ("extrapolate_count", "extrapolate_anchor")}


def _jump(state: ExtrapolateState, evaluate: Callable, flat: tuple, options: _Options) -> tuple:
    """Updates, next anchor and record after a search."""
    start, leaves, given, moving = flat
    raw = optax.apply_updates(leaves, given)

    def candidate(factor):
        return _proposed(start, raw, factor, moving)

    found, evaluations = _search(lambda leaves: evaluate(raw, leaves), candidate, options)
    out = [
        jnp.where(found.factor > 0, _difference(c, p, u.dtype), u) if moves else u
        for c, p, u, moves in zip(candidate(found.factor), leaves, given, moving, strict=True)
    ]
    after = optax.apply_updates(leaves, out) if options.anchor == "accepted" else raw
    return out, after, dict(
        extrapolate_factor=found.factor,
        extrapolate_scores=found.scores,
        extrapolate_searches=state.extrapolate_searches + 1,
        extrapolate_accepted=state.extrapolate_accepted + found.accepted,
        extrapolate_failures=state.extrapolate_failures + found.failures,
        extrapolate_evaluations=state.extrapolate_evaluations + evaluations,
    )  # fmt: skip


def _difference(new: jax.Array, old: jax.Array, dtype: Any) -> jax.Array:
    wide = jnp.promote_types(old.dtype, jnp.float32)
    return (new.astype(wide) - old.astype(wide)).astype(dtype)


def _search(
    evaluate: Callable[[list], tuple[jax.Array, jax.Array]],
    candidate: Callable[[ArrayLike], list],
    options: _Options,
) -> tuple[_Found, jax.Array]:
    """`extrapolation.search` on the device; also the number of evaluations.

    The start is the candidate of factor 0: the score is compiled once, and all scores are rounded alike. The
    loop carries scores only; a candidate is made again from its factor when it is wanted.
    """
    factors = jnp.array([0.0, *options.factors], jnp.float32)

    def at(factor):
        return evaluate(candidate(factor))

    if options.batched:
        values = jax.vmap(at)(factors)

    def body(found):
        factor = factors[found.tried]
        if options.batched:
            value, distance = (jax.lax.dynamic_index_in_dim(x, found.tried, 0, False) for x in values)
        else:
            value, distance = at(factor)
        return _step(found, value, distance, factor, options)

    found = _Found(
        tried=jnp.zeros([], jnp.int32),
        going=jnp.ones([], bool),
        best=jnp.zeros_like(jax.eval_shape(at, factors[0])[0]),
        factor=jnp.zeros([], jnp.float32),
        scores=jnp.full(factors.shape, jnp.nan, jnp.float32),
        accepted=jnp.zeros([], jnp.int32),
        failures=jnp.zeros([], jnp.int32),
    )
    found = jax.lax.while_loop(lambda f: f.going & (f.tried < factors.size), body, found)
    return found, jnp.int32(factors.size) if options.batched else found.tried


def _step(
    found: _Found, value: jax.Array, distance: jax.Array, factor: jax.Array, options: _Options
) -> _Found:
    """Takes the start, accepts the next candidate, or ends the search."""
    first = found.tried == 0
    mean = value.mean()
    within = True if options.max_kl is None else first | (distance <= options.max_kl)
    better = accepts(options.rule, value, found.best, options.margin) & within
    better = jnp.where(first, jnp.isfinite(mean), better)
    failed = ~jnp.isfinite(jnp.where(within, mean, distance))
    return _Found(
        tried=found.tried + 1,
        going=better,
        best=jnp.where(better, value, found.best),
        factor=jnp.where(better, factor, found.factor),
        scores=found.scores.at[found.tried].set(jnp.where(within, mean, jnp.nan)),
        accepted=found.accepted + (better & ~first),
        failures=found.failures + failed,
    )
