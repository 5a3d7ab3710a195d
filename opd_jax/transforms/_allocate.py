"""Which modules training moves: measured over the first steps, then reported, scaled or frozen."""

import math
import numbers
import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from opd_jax.transforms._explicit import auto
from opd_jax.transforms._matrices import (
    _VECTORS,
    Matrices,
    Matrix,
    all_matrices,
    block_matrices,
    kind_of,
    path_name,
    select,
)

_MODES = ("report", "scale", "freeze")
_MEASURES = ("relative_update", "loss_decrease")
_HEADS = r"lm_head|unembed|\bhead\b"


class AllocateState(NamedTuple):
    """State of `allocate_modules`; a tuple has one array for each selected leaf, [stack] unless said.

    Attributes:
        allocate_count: updates seen, [] int32.
        allocate_displacement: the sum of the window's updates, a tree like the parameters (zeros where
            nothing is selected); of `accumulate="path"`: ().
        allocate_squares: squared norm of what was accumulated: of the sum, or the sum of the updates'.
        allocate_norms: norms of the parameters before the first update.
        allocate_decreases: the sum of -<g, u>, first-order decreases of the loss.
        allocate_measures: the measure; after the window it stays.
        allocate_ranks: 0 for the greatest measure of all matrices, int32; 0 everywhere inside the window.
        allocate_factors: what updates are multiplied by; 1 inside the window.
    """

    allocate_count: jax.Array
    allocate_displacement: Any
    allocate_squares: tuple[jax.Array, ...]
    allocate_norms: tuple[jax.Array, ...]
    allocate_decreases: tuple[jax.Array, ...]
    allocate_measures: tuple[jax.Array, ...]
    allocate_ranks: tuple[jax.Array, ...]
    allocate_factors: tuple[jax.Array, ...]


class _Options(NamedTuple):
    steps: ArrayLike
    mode: str
    measure: str
    fraction: ArrayLike
    power: ArrayLike
    limit: ArrayLike
    accumulate: str


def module_matrices(params: Any) -> Any:
    """`block_matrices` and the embeddings of the input; no output head, norm or bias."""

    def axes(path, block, other):
        name = path_name(path)
        embeds = kind_of(name) == "embedding" and not re.search(_HEADS, name.lower())
        return other if embeds else block

    blocks, others = block_matrices(params), all_matrices(params)
    is_leaf = lambda x: x is None  # noqa: E731
    return jax.tree_util.tree_map_with_path(axes, blocks, others, is_leaf=is_leaf)


def allocate_modules(
    steps: ArrayLike,
    mode: Literal["report", "scale", "freeze"] = "report",
    measure: Literal["relative_update", "loss_decrease"] = "relative_update",
    *,
    fraction: ArrayLike = 0.5,
    power: ArrayLike = 0.5,
    limit: ArrayLike = 4.0,
    accumulate: Literal["displacement", "path"] = "displacement",
    displacement_dtype: Any = "float32",
    matrices: Matrices = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Measures over the first steps which matrices training moves, and gives each its share from then on.

    .. math:: x_i = \frac{\|\Delta W_i\|_F}{\|W_i\|_F} \quad\text{or}\quad
        x_i = \frac{-\sum_t \langle g_{t,i}, u_{t,i} \rangle}{\|\Delta W_i\|_F},
        \qquad \Delta W_i = \sum_{t \le n} u_{t,i}

    with W before the first step, u the updates that come in and g the gradients: place it after the
    optimiser. Stacked layers are matrices of their own. A matrix that moved by more than its own norm has
    relative update 1 (one that began at 0 would have infinity). Inside the window of n steps all updates
    pass. Then, by mode:

    - "report": they still do, bit for bit.
    - "scale": they are multiplied by

      .. math:: f_i = a_i \Big/ \frac1N \sum_j a_j, \qquad
          a_i = \mathrm{clip}\big((x_i^+ / \bar x)^p,\ 1/\ell,\ \ell\big)

      with the mean over all N matrices as the bar: monotone in the measure, and of mean 1, so that the
      learning rates keep their mean whatever the measures are.
    - "freeze": those of the floor(fraction * N) matrices with the least measure are set to 0; all others
      pass bit for bit. The optimiser before this transform still keeps moments for them: to save compute and
      memory a trainer rebuilds its step once from `frozen_modules`. In a small study half of the matrices
      could be frozen at little cost in quality, and with little saved: not worth it by default.

    Norms and biases are never selected by default, and "freeze" refuses a selection with one. What was
    measured stays in the state: see `module_report`.

    The displacement is a copy of the parameters that the state keeps after the window, since its structure is
    fixed. `accumulate="path"` has none: it takes :math:`(\sum_t \|u_t\|^2)^{1/2}` as the norm of dW, right
    for updates at right angles and up to sqrt(n) too small for parallel ones, as those of early steps often
    are; ranks suffer only where matrices differ in that.

    Under `inject_hyperparams` a function is static: `static_args=("matrices",)`.

    Args:
        steps: n, >= 1.
        mode: see above.
        measure: "loss_decrease" needs the gradients as the extra argument `grad` of `update`, and no
            parameters; "relative_update" needs the parameters.
        fraction: of the matrices to freeze, in [0, 1).
        power: p >= 0; 0 makes all factors 1.
        limit: l >= 1.
        accumulate: see above.
        displacement_dtype: of the accumulated updates.
        matrices: see `MatrixAxes`; default: `block_matrices` and the input embedding.

    Returns:
        The transform.

    Raises:
        ValueError: if an argument is out of range; from `init` if nothing is selected, or a norm or bias is
            to be frozen; from `update` without the parameters or `grad` that the measure needs, or if the
            updates are no tree like that of `init`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from opd_jax.transforms import frozen_modules
        >>> tx = optax.chain(optax.sgd(0.1), allocate_modules(1, "freeze", fraction=0.5))
        >>> params = {"up": jnp.ones((2, 2)), "down": jnp.ones((2, 2))}
        >>> grads, state = {"up": jnp.ones((2, 2)), "down": 2 * jnp.ones((2, 2))}, tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(grads, state, params)
        >>> print(updates["up"][0], updates["down"][0], frozen_modules(state, params))
        [0. 0.] [-0.2 -0.2] {'down': array([False]), 'up': array([ True])}

    References:
        Cai et al., `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_ (module allocation)
    """
    options = _Options(steps, mode, measure, fraction, power, limit, accumulate)
    _check(options)
    displacement_dtype = jnp.dtype(displacement_dtype)
    if not jnp.issubdtype(displacement_dtype, jnp.floating):
        raise ValueError(f"displacement_dtype must be floating point, got {displacement_dtype}")

    def init(params):
        found = _selected(params, matrices, mode)
        zeros = tuple(jnp.zeros(m.shape[0], jnp.float32) for m in found)
        displacement = ()
        if accumulate == "displacement":
            displacement = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=displacement_dtype), params)
        return AllocateState(
            allocate_count=jnp.zeros([], jnp.int32),
            allocate_displacement=displacement,
            allocate_squares=_or_scalar(zeros, found),
            allocate_norms=_or_scalar(tuple(map(jnp.copy, zeros)), found),
            allocate_decreases=_or_scalar(tuple(map(jnp.copy, zeros)), found),
            allocate_measures=_or_scalar(tuple(map(jnp.copy, zeros)), found),
            allocate_ranks=_or_scalar(tuple(z.astype(jnp.int32) for z in zeros), found),
            allocate_factors=_or_scalar(tuple(map(jnp.ones_like, zeros)), found),
        )

    def update(updates, state, params=None, *, grad=None, **extra_args):
        del extra_args
        if not jax.tree.leaves(updates):
            return updates, state._replace(allocate_count=optax.safe_increment(state.allocate_count))
        found = _selected(updates, matrices, mode)
        _check_state(state, found)
        leaves, treedef = jax.tree.flatten(updates)
        weights = _others(params, treedef, "params") if measure == "relative_update" else None
        grads = _others(grad, treedef, "grad") if measure == "loss_decrease" else None
        factors = state.allocate_factors
        if mode != "report":
            for matrix, factor in zip(found, factors, strict=True):
                leaves[matrix.index] = _scaled(leaves[matrix.index], factor, matrix, mode)
        state = _watch(state, found, (jax.tree.leaves(updates), weights, grads), options)
        return (updates if mode == "report" else jax.tree.unflatten(treedef, leaves)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check(options: _Options) -> None:
    for name, value, known in (
        ("mode", options.mode, _MODES),
        ("measure", options.measure, _MEASURES),
        ("accumulate", options.accumulate, ("displacement", "path")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
    whole = isinstance(options.steps, int | np.integer) and not isinstance(options.steps, bool)
    if not isinstance(options.steps, jax.Array) and not (whole and options.steps >= 1):
        raise ValueError(f"steps must be an int >= 1, got {options.steps!r}")
    for name, value, low, high in (
        ("fraction", options.fraction, 0.0, 1.0),
        ("power", options.power, 0.0, math.inf),
        ("limit", options.limit, 1.0, math.inf),
    ):
        if isinstance(value, numbers.Real) and not low <= value < high:  # an injected one is an array
            raise ValueError(f"{name} must be in [{low:g}, {high:g}), got {value!r}")


def _selected(params: Any, matrices: Matrices, mode: str) -> tuple[Matrix, ...]:
    if not jax.tree.leaves(params):
        return ()
    found = select(params, module_matrices if matrices is None else matrices, "allocate_modules")
    vectors = [m.name for m in found if re.search(_VECTORS, m.name.lower())]
    if mode == "freeze" and vectors:
        raise ValueError(
            f"allocate_modules: norms and biases are never frozen; deselect {', '.join(vectors)}"
        )
    return found


def _or_scalar(arrays: tuple[jax.Array, ...], found: tuple[Matrix, ...]) -> Any:
    """Without parameters one leaf in place of the tuple, for `optax.tree.map_params`."""
    return arrays if found else jnp.zeros([])


def _check_state(state: AllocateState, found: tuple[Matrix, ...]) -> None:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(state.allocate_factors)]
    if shapes != [(m.shape[0],) for m in found]:
        raise ValueError(
            "allocate_modules: the state is that of other parameters or other `matrices`: it has stacks of "
            f"{shapes}, but selected are {', '.join(f'{m.name} {m.shape}' for m in found)}"
        )


def _others(tree: Any, treedef: Any, name: str) -> list:
    if tree is None:
        hint = "the extra argument `grad`, the gradients," if name == "grad" else "`params`"
        raise ValueError(f"allocate_modules: its measure needs {hint} when calling `update`")
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(f"allocate_modules: {name} is no tree like the updates: {error}") from None


def _scaled(update: jax.Array, factor: jax.Array, matrix: Matrix, mode: str) -> jax.Array:
    """The update of a leaf times the factor of each matrix; 0 of a frozen one, whatever the update is."""
    used = matrix.axes.rows + matrix.axes.columns
    factor = factor.reshape([1 if a in used else n for a, n in enumerate(update.shape)])
    if mode == "freeze":
        return jnp.where(factor == 0, jnp.zeros([], update.dtype), update)
    return (update.astype(jnp.float32) * factor).astype(update.dtype)


def _watch(state: AllocateState, found: tuple[Matrix, ...], flat: tuple, options: _Options) -> AllocateState:
    """The state after the updates: inside the window measured anew, later only counted."""
    updates, params, grads = flat
    chosen = [m.index for m in found]
    displacement, treedef = jax.tree.flatten(state.allocate_displacement)
    fields = ("squares", "norms", "decreases", "measures", "ranks", "factors")
    record = {f"allocate_{name}": getattr(state, f"allocate_{name}") for name in fields}
    count = optax.safe_increment(state.allocate_count)

    def window():
        moved = [updates[i].astype(jnp.float32) for i in chosen]
        summed = list(displacement)
        if options.accumulate == "displacement":
            for i, update in zip(chosen, moved, strict=True):
                summed[i] = (displacement[i].astype(jnp.float32) + update).astype(displacement[i].dtype)
            norm_of = [summed[i] for i in chosen]
        else:
            norm_of = moved
        others = [None if x is None else [x[i] for i in chosen] for x in (params, grads)]
        specs = jax.tree.map(lambda _: P(), record)
        measured = auto(
            lambda *args: _measured(found, options, *args), specs, count, record, norm_of, moved, *others
        )
        return summed, jax.tree.map(
            lambda new, old: new.astype(old.dtype), measured, record
        )  # also under x64

    summed, record = jax.lax.cond(
        state.allocate_count < options.steps, window, lambda: (displacement, record)
    )
    displacement = jax.tree.unflatten(treedef, summed)
    return state._replace(allocate_count=count, allocate_displacement=displacement, **record)


def _measured(
    found: tuple[Matrix, ...],
    options: _Options,
    count: jax.Array,
    record: dict[str, tuple],
    norm_of: list[jax.Array],
    moved: list[jax.Array],
    params: list[jax.Array] | None,
    grads: list[jax.Array] | None,
) -> dict[str, tuple]:
    """The record after one more update of the window."""

    def sums(xs: list, ys: list) -> tuple:
        return tuple(_dot(x, y, m) for x, y, m in zip(xs, ys, found, strict=True))

    squares = sums(norm_of, norm_of)
    norms, decreases = record["allocate_norms"], record["allocate_decreases"]
    if options.accumulate == "path":
        squares = jax.tree.map(jnp.add, record["allocate_squares"], squares)
    if params is not None:
        first = jax.tree.map(jnp.sqrt, sums(params, params))
        norms = jax.tree.map(lambda old, new: jnp.where(count == 1, new, old), norms, first)
    if grads is not None:
        decreases = jax.tree.map(jnp.subtract, decreases, sums(grads, moved))
    lengths = jax.tree.map(jnp.sqrt, squares)
    if options.measure == "relative_update":
        measures = jax.tree.map(lambda d, w: _ratio(d, jnp.maximum(d, w)), lengths, norms)
    else:
        measures = jax.tree.map(_ratio, decreases, lengths)
    ends = np.cumsum([m.shape[0] for m in found])[:-1]
    ranks, factors = _allocated(jnp.concatenate(measures), options)
    due = count == options.steps
    return dict(
        allocate_squares=squares,
        allocate_norms=norms,
        allocate_decreases=decreases,
        allocate_measures=measures,
        allocate_ranks=tuple(jnp.split(jnp.where(due, ranks, 0), ends)),
        allocate_factors=tuple(jnp.split(jnp.where(due, factors, 1.0), ends)),
    )


def _dot(x: jax.Array, y: jax.Array, matrix: Matrix) -> jax.Array:
    """Of each matrix of a leaf, [stack] float32."""
    products = x.astype(jnp.float32) * y.astype(jnp.float32)
    return products.sum(matrix.axes.rows + matrix.axes.columns).reshape(-1)


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, and 0 where y is 0 or the ratio is not finite."""
    ratio = x / jnp.where(y == 0, 1.0, y)
    return jnp.where((y == 0) | ~jnp.isfinite(ratio), 0.0, ratio)


def _allocated(measures: jax.Array, options: _Options) -> tuple[jax.Array, jax.Array]:
    """Ranks and factors from the measures of all matrices, [N]."""
    number = measures.size
    order = jnp.argsort(-measures)  # stable
    ranks = jnp.zeros(number, jnp.int32).at[order].set(jnp.arange(number, dtype=jnp.int32))
    if options.mode == "report":
        return ranks, jnp.ones(number)
    if options.mode == "freeze":
        lowest = jnp.floor(options.fraction * number + 1e-4).astype(jnp.int32)  # 0.29 * 100 is 28.999...
        return ranks, jnp.where(ranks >= number - lowest, 0.0, 1.0)
    positive = jnp.maximum(measures, 0.0)
    relative = _ratio(positive, positive.mean())
    powers = jnp.clip(relative**options.power, 1.0 / options.limit, options.limit)
    powers = jnp.where(positive.any(), powers, 1.0)
    return ranks, powers / powers.mean()
