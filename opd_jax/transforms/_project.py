"""Any optax optimiser in the coordinates of a subspace that follows the gradient."""

import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike

from opd_jax.transforms import _coordinates as coordinates
from opd_jax.transforms._coordinates import Part
from opd_jax.transforms._matrices import Matrices, path_name

SECOND_MOMENTS = ("nu", "nu_max", "sum_of_squares", "e_g", "e_x")
"""Fields of the states of optax's optimisers that hold means of squares, not of vectors."""


class ProjectState(NamedTuple):
    """State of `project_to_subspace`; k is the rank, of a matrix [m, n] or a stack of them.

    Attributes:
        project_count: updates seen, [] int32.
        project_left: bases [stack, m, k] float32 of the matrices projected from the left, in order.
        project_right: bases [stack, n, k] float32 of those projected from the right.
        project_inner: the inner optimiser's, for a tree like the parameters with coordinates in them.
        project_residual: with error feedback what is still to be applied, a tree like the parameters (zeros
            where nothing is projected); else ().
        project_energy: of each matrix the share of the squared gradient norm inside its subspace at the last
            update, a tuple of [stack] float32; 0 for a zero gradient.
        project_reference: mean energy at the update after the last refresh, [] float32.
        project_drift: share of the reference that has been lost since, [] float32.
        project_overlap: ||U_new^T U_old||_F^2 / k at the last refresh, mean over all bases, [] float32.
        project_refreshed: count before the update of the last refresh, [] int32; -1: none yet.
        project_refreshes: how many there were, [] int32.
        project_streak: refreshes in a row with an overlap above the threshold of lock-in, [] int32.
        project_locked: count before the update at which the bases were locked, [] int32; -1: not yet.
    """

    project_count: jax.Array
    project_left: tuple[jax.Array, ...]
    project_right: tuple[jax.Array, ...]
    project_inner: Any
    project_residual: Any
    project_energy: tuple[jax.Array, ...]
    project_reference: jax.Array
    project_drift: jax.Array
    project_overlap: jax.Array
    project_refreshed: jax.Array
    project_refreshes: jax.Array
    project_streak: jax.Array
    project_locked: jax.Array


class _Options(NamedTuple):
    rank: int
    sides: str
    refresh: ArrayLike
    drift: ArrayLike | None
    stop_after_lock_in: ArrayLike | None
    iterations: ArrayLike
    feedback: bool
    residual_dtype: Any
    on_small: str
    second_moments: tuple[str, ...]
    scale: ArrayLike


def project_to_subspace(
    inner: optax.GradientTransformation,
    rank: int,
    *,
    sides: Literal["auto", "left", "right", "both"] = "auto",
    refresh: ArrayLike = 200,
    drift: ArrayLike | None = None,
    stop_after_lock_in: ArrayLike | None = None,
    iterations: ArrayLike = 2,
    residual: Literal["drop", "error_feedback"] = "drop",
    residual_dtype: Any = "float32",
    matrices: Matrices = None,
    scale: ArrayLike = 1.0,
    on_small: Literal["clamp", "error"] = "clamp",
    second_moments: Sequence[str] = SECOND_MOMENTS,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an optimiser in the coordinates of the leading singular subspace of each matrix's gradient.

    .. math:: C = U^T G \ \text{(left)}, \quad G V \ \text{(right)}, \quad U^T G V \ \text{(both)},
        \qquad u = s\, U\, \mathrm{inner}(C)

    U is [m, k], V is [n, k]. Adam's moments of a matrix [m, n] shrink by m / k from the left, n / k from the
    right, mn / k^2 from both; the basis adds km (kn). Parameters that are not `matrices` go through the same
    inner optimiser in full.

    *Refresh.* Every `refresh` updates the bases follow the present gradient by warm-started block iteration
    (CholeskyQR2): products of the gradient with k columns, no SVD, so that sharded and stacked matrices work
    and it compiles on TPU in seconds. Of the new subspace that basis is taken which is turned least from the
    old one, so that coordinates stay where the subspace does. Moments move along. With R = U_new^T U_old, a
    first moment becomes R M. Of a second moment, in coordinates taken as uncorrelated, and with what is not
    known about new directions filled by the mean of the old,

    .. math:: N \leftarrow (R \circ R) N + (1 - (R \circ R) 1)\, \tfrac1k 1^T N.

    Bare :math:`(R \circ R) N` would be too small there, and Adam's steps too long. `drift` refreshes also
    when the share of the gradient's energy inside the subspace, mean over all matrices, has fallen by that
    share of what it was at the update after the last refresh (a gradient that the basis was not made from).
    `stop_after_lock_in` ends refreshing once two refreshes in a row have had an overlap with the bases before
    them above that threshold.

    *Residual.* "drop" forgets what is outside of the subspace, as GaLore does. "error_feedback" keeps it in
    a copy of the parameters and adds it to the next gradient: with plain SGD all that was applied and the
    residual add up to all gradients.

    *Parameters* are seen by the inner optimiser in coordinates, too: `adamw` inside decays only the part of W
    in the subspace. To decay all of it, put `optax.add_decayed_weights` behind this transform. Its masks and
    labels see names as in the parameters. Extra arguments pass to it as they come.

    *Layout.* Coordinates have as many axes as their parameter: of the axes that make its rows (from the
    left) the first has size k and others 1. So rules that lay out moments as their parameters hold, if the
    mesh axis divides k. `init` itself does so with arrays that are on a mesh, and leaves whole what it does
    not divide. Use it under `jax.set_mesh` if axes are Explicit. Coordinates, bases and moments are float32.

    *Against* `optax.contrib.galore`: that takes an SVD in the step (minutes to compile on TPU, and it gathers
    a sharded matrix), leaves moments behind when the basis turns, takes no extra arguments and gives the
    inner optimiser no parameters; a stack of layers is left out. Both project the longer side by default.
    On a problem with gradients of low rank both reach the loss of full Adam.

    Under `inject_hyperparams` rank and functions are static: `static_args=("rank", "matrices")`.

    Args:
        inner: such as `optax.scale_by_adam()` or `optax.adamw(lr)`.
        rank: k, >= 1.
        sides: "left" projects rows, "right" columns; "auto" the longer of them.
        refresh: updates between refreshes, >= 1.
        drift: in (0, 1); None: no refresh on drift.
        stop_after_lock_in: in (0, 1]; None: never.
        iterations: of a refresh, >= 1; the first takes 8 or more, from a random basis.
        residual: see above.
        residual_dtype: of the residual.
        matrices: see `MatrixAxes`; default: `block_matrices`. Stacked layers have a basis each.
        scale: s, of projected updates.
        on_small: where a matrix has a side shorter than k: take that for k and warn, or raise.
        second_moments: fields of the inner state that hold means of squares. Others of the coordinates' shape
            are taken as means of vectors; of another shape (factored moments) they stay as they are.

    Returns:
        The transform; `update` needs the parameters only if the inner optimiser does.

    Raises:
        ValueError: if an argument is out of range; from `init` if nothing is selected, or a matrix is too
            small for the rank with `on_small="error"`; from `update` if the updates are no tree like that
            of `init`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = project_to_subspace(optax.sgd(1.0), rank=1)
        >>> grads = {"up": jnp.outer(jnp.arange(3.0), jnp.ones(2))}  # of rank 1: nothing is lost
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> print((updates["up"] + 0.0).round(4))
        [[ 0.  0.]
         [-1. -1.]
         [-2. -2.]]

    References:
        Zhao et al., `arXiv:2403.03507 <https://arxiv.org/abs/2403.03507>`_ (GaLore);
        Robert et al., `arXiv:2410.16103 <https://arxiv.org/abs/2410.16103>`_ (LDAdam: transported moments)
    """
    options = _Options(
        rank=rank,
        sides=sides,
        refresh=refresh,
        drift=drift,
        stop_after_lock_in=stop_after_lock_in,
        iterations=iterations,
        feedback=residual == "error_feedback",
        residual_dtype=residual_dtype,
        on_small=on_small,
        second_moments=tuple(second_moments),
        scale=scale,
    )
    _check(options, residual)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        if not jax.tree.leaves(params):
            feedback = params if options.feedback else ()
            return _state(inner.init(params), feedback, jnp.zeros([]), jnp.zeros([]), jnp.zeros([]))
        parts = coordinates.parts(params, matrices, options.rank, options.sides, options.on_small)
        leaves, treedef = jax.tree.flatten(params)
        left, right = coordinates.first_bases(parts, leaves)
        zeros = [coordinates.zeros(part, leaves[part.matrix.index]) for part in parts]
        kept = ()
        if options.feedback:
            kept = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=options.residual_dtype), params)
        energy = tuple(jnp.zeros(p.matrix.shape[0], jnp.float32) for p in parts)
        return _state(inner.init(_with(zeros, parts, leaves, treedef)), kept, left, right, energy)

    def update(updates, state, params=None, **extra_args):
        if not jax.tree.leaves(updates):
            return updates, state
        parts = coordinates.parts(updates, matrices, options.rank, options.sides, None)
        return _update(updates, state, params, extra_args, parts, inner, options)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(options: _Options, residual: str) -> None:
    rank = options.rank
    if not isinstance(rank, int | np.integer) or isinstance(rank, bool) or rank < 1:
        hint = "; it is static: inject_hyperparams(..., static_args=('rank',))"
        raise ValueError(f"rank must be an int >= 1, got {rank!r}" + hint * isinstance(rank, jax.Array))
    for name, value, known in (
        ("sides", options.sides, ("auto", "left", "right", "both")),
        ("residual", residual, ("drop", "error_feedback")),
        ("on_small", options.on_small, ("clamp", "error")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
    for name, value in (("refresh", options.refresh), ("iterations", options.iterations)):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not isinstance(value, jax.Array) and not (whole and value >= 1):  # an injected one is an array
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    for name, value in (("drift", options.drift), ("stop_after_lock_in", options.stop_after_lock_in)):
        if isinstance(value, numbers.Real) and not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], or None, got {value!r}")
    if isinstance(options.scale, numbers.Real) and not np.isfinite(options.scale):
        raise ValueError(f"scale must be finite, got {options.scale!r}")
    if not jnp.issubdtype(jnp.dtype(options.residual_dtype), jnp.floating):
        raise ValueError(f"residual_dtype must be floating point, got {options.residual_dtype!r}")


def _state(inner_state: Any, residual: Any, left: Any, right: Any, energy: Any) -> ProjectState:
    return ProjectState(
        project_count=jnp.zeros([], jnp.int32),
        project_left=left,
        project_right=right,
        project_inner=inner_state,
        project_residual=residual,
        project_energy=energy,
        project_reference=jnp.zeros([], jnp.float32),
        project_drift=jnp.zeros([], jnp.float32),
        project_overlap=jnp.zeros([], jnp.float32),
        project_refreshed=jnp.full([], -1, jnp.int32),
        project_refreshes=jnp.zeros([], jnp.int32),
        project_streak=jnp.zeros([], jnp.int32),
        project_locked=jnp.full([], -1, jnp.int32),
    )


def _update(
    updates: Any,
    state: ProjectState,
    params: Any,
    extra_args: dict[str, Any],
    parts: tuple[Part, ...],
    inner: optax.GradientTransformationExtraArgs,
    options: _Options,
) -> tuple[Any, ProjectState]:
    """Below this, trees are lists of leaves, and `grads` those of the parts."""
    coordinates.check_bases(parts, state.project_left, state.project_right)
    leaves, treedef = jax.tree.flatten(updates)
    grads = _chosen(leaves, parts)
    kept, kept_treedef = jax.tree.flatten(state.project_residual)
    if options.feedback:
        grads = [g.astype(jnp.float32) + r for g, r in zip(grads, _chosen(kept, parts), strict=True)]
    state = _refreshed(state, updates, grads, parts, options)
    bases = state.project_left, state.project_right

    inside = coordinates.project(parts, grads, *bases)
    if options.feedback:
        rest = zip(grads, coordinates.lift(parts, inside, *bases, like=grads), strict=True)
        kept = _replaced(kept, parts, [(g - x).astype(options.residual_dtype) for g, x in rest])
    if params is not None:
        params = _flat(params, treedef)
        small = coordinates.project(parts, _chosen(params, parts), *bases)
        params = _with(small, parts, params, treedef)
    given = _with(inside, parts, leaves, treedef)
    out, inner_state = inner.update(given, state.project_inner, params, **extra_args)
    out = jax.tree.leaves(out)
    if len(out) != len(leaves):
        raise ValueError(f"project_to_subspace: inner made {len(out)} updates of {len(leaves)}")
    lifted = coordinates.lift(parts, _chosen(out, parts), *bases, like=grads)
    dtypes = [leaves[p.matrix.index].dtype for p in parts]
    lifted = [(options.scale * x).astype(dtype) for x, dtype in zip(lifted, dtypes, strict=True)]
    out = jax.tree.unflatten(treedef, _replaced(out, parts, lifted))
    return out, _watched(state, coordinates.energies(parts, inside, grads))._replace(
        project_count=optax.safe_increment(state.project_count),
        project_inner=inner_state,
        project_residual=jax.tree.unflatten(kept_treedef, kept),
    )


def _chosen(flat: list, parts: tuple[Part, ...]) -> list:
    return [flat[part.matrix.index] for part in parts]


def _replaced(flat: list, parts: tuple[Part, ...], values: list) -> list:
    flat = list(flat)
    for part, value in zip(parts, values, strict=True):
        flat[part.matrix.index] = value
    return flat


def _with(values: list, parts: tuple[Part, ...], flat: list, treedef: Any) -> Any:
    """The tree that the inner optimiser sees, with these coordinates.

    They are not wrapped as flax wraps parameters: by the sharding in a variable's metadata nnx.Optimizer
    would spread them over axes that need not divide them.
    """
    new = {id(value) for value in values}

    def bare(node):
        leaves = jax.tree.leaves(node)
        return leaves[0] if len(leaves) == 1 and id(leaves[0]) in new else node

    tree = jax.tree.unflatten(treedef, _replaced(flat, parts, values))
    return jax.tree.map(bare, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _flat(tree: Any, treedef: Any) -> list:
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"project_to_subspace: the parameters are no tree like the updates: {error}"
        ) from None


def _refreshed(
    state: ProjectState, updates: Any, grads: list, parts: tuple[Part, ...], options: _Options
) -> ProjectState:
    """The state with bases that follow the gradients, if it is time for that."""
    count, first = state.project_count, state.project_refreshed < 0
    # A gradient of 0, as that of LoRA's A at first, has no subspace: try again at once.
    blind = jnp.concatenate([jnp.ravel(e) for e in state.project_energy]).min() == 0
    due = (count % options.refresh == 0) | ((count == 1) & blind)
    if options.drift is not None:
        due |= state.project_drift > options.drift
    due &= state.project_locked < 0
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(updates)]
    flat, treedef = jax.tree.flatten(state.project_inner)
    which = coordinates.moments(state.project_inner, names, parts, options.second_moments)
    old = state.project_left, state.project_right, [flat[m.place] for m in which], state.project_overlap

    def move():
        times = jnp.where(first, jnp.maximum(options.iterations, 8), options.iterations)
        return coordinates.refresh(parts, grads, *old[:3], which, times.astype(jnp.int32))

    left, right, values, overlap = jax.lax.cond(due, move, lambda: old)
    for moment, value in zip(which, values, strict=True):
        flat[moment.place] = value
    overlap = jnp.where(first, 0.0, overlap)
    state = state._replace(
        project_left=left,
        project_right=right,
        project_inner=jax.tree.unflatten(treedef, flat),
        project_overlap=overlap,
        project_refreshed=jnp.where(due, count, state.project_refreshed),
        project_refreshes=state.project_refreshes + due,
    )
    if options.stop_after_lock_in is None:
        return state
    streak = jnp.where(overlap > options.stop_after_lock_in, state.project_streak + 1, 0)
    streak = jnp.where(due, streak, state.project_streak).astype(jnp.int32)
    locks = due & (streak >= 2)
    return state._replace(project_streak=streak, project_locked=jnp.where(locks, count, state.project_locked))


def _watched(state: ProjectState, energy: tuple[jax.Array, ...]) -> ProjectState:
    """The energy, and what of it has been lost since the update after the last refresh."""
    mean = jnp.concatenate(energy).mean()
    age = state.project_count - state.project_refreshed
    reference = jnp.where(age == 1, mean, jnp.where(age == 0, 0.0, state.project_reference))
    lost = jnp.maximum(1.0 - mean / jnp.where(reference > 0, reference, 1.0), 0.0)
    return state._replace(
        project_energy=energy,
        project_reference=reference,
        project_drift=jnp.where((reference > 0) & (age > 0), lost, 0.0),
    )
