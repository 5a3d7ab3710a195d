"""Watching the subspace into which updates concentrate, inside an optax chain."""

import warnings
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from opd_jax.transforms import spectrum
from opd_jax.transforms._blocks import Product, subspace_steps
from opd_jax.transforms._explicit import auto, explicit_mesh, laid_out
from opd_jax.transforms._matrices import Matrices, Matrix, select, to_stack
from opd_jax.transforms._products import Pair, change, paired, product_norm

Of = Literal["updates", "gradients", "displacement"]


class Probe(NamedTuple):
    """What the last probes found of one stack of S matrices m x n, k directions of each.

    Attributes:
        left: [S, m, k] float32, leading left singular directions.
        right: [S, n, k] float32.
        first: [S, m, k] float32, `left` of the first probe that found anything.
        values: [S, k] float32, singular values.
        norm: [S] float32, Frobenius norm.
        energy: [S] float32, share of norm^2 in the k directions.
        effective_rank: [S] float32.
        overlap: [S] float32, of `left` with that of the probe before, ||U^T U'||_F^2 / k.
        first_overlap: [S] float32, with `first`.
        lock_in: [S] int32, step since which `overlap` has stayed above the threshold; -1: it does not.
    """

    left: jax.Array
    right: jax.Array
    first: jax.Array
    values: jax.Array
    norm: jax.Array
    energy: jax.Array
    effective_rank: jax.Array
    overlap: jax.Array
    first_overlap: jax.Array
    lock_in: jax.Array


class TrackSubspaceState(NamedTuple):
    """State of `track_subspace`.

    Attributes:
        track_count: int32 scalar, updates seen.
        track_step: int32 scalar, the update that was probed last; 0: none.
        track_probes: one `Probe` for each selected leaf, or adapter, in the order of the leaves.
        track_displacement: tree like the parameters, the sum of updates at selected leaves, 0 at others; ()
            if not asked for.
    """

    track_count: jax.Array
    track_step: jax.Array
    track_probes: tuple[Probe, ...]
    track_displacement: Any


def track_subspace(
    rank: int = 16,
    every: int = 10,
    of: Of = "updates",
    *,
    matrices: Matrices = None,
    lock_in: float = 0.9,
    on_small: Literal["clamp", "error"] = "clamp",
    lanczos: tuple[int, int] | None = None,
    iterations: int = 1,
    displacement_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Passes updates through, and keeps the leading singular subspace of each matrix in its state.

    Every `every` steps block subspace iteration goes on from the bases of the probe before
    (`spectrum.subspace_step`; a cold start takes four), for

    .. math:: X = u_t \quad\text{or}\quad X = W_t - W_0 = \sum_{s \le t} u_s

    Nothing of the size of a weight is factorised or gathered, so that it costs little and compiles for a pod.
    What it finds: singular values, spectral norm and ratio, captured energy, effective rank, the overlap with
    the subspace of the probe before and of the first, and the step of lock-in; see `subspace_summary`.

    The leaves `lora_a` [in, r] and `lora_b` [r, out] of a low-rank adapter are one matrix, A B without its
    scale, and what is probed is how that product changes: exact with k >= 2 r, and never multiplied out.

    Args:
        rank: k, directions followed in each matrix; stacked layers are matrices of their own.
        every: steps from one probe to the next; the first update is probed.
        of: "updates", what comes in; "gradients", the same under the name that fits if it stands before the
            optimiser, those of an adapter's A and B apart; "displacement", their sum, which must then be the
            final updates: put it last.
        matrices: which leaves are matrices and how, see `MatrixAxes`; None: `block_matrices`, all but
            embeddings, norms and biases.
        lock_in: threshold of the overlap of successive probes.
        on_small: a matrix with a side below `rank` is followed with as many directions as it has, with a
            warning, or is an error.
        lanczos: (probes, steps) of `spectrum.effective_rank_estimate`, within 5% for (8, 16), at several
            times the cost of a probe. None: the effective rank if the energy that is not captured were spread
            evenly over the other directions, an upper bound; always so for adapters, which have 2 r of them.
        iterations: of a probe, at least 1: more where matrices change much from one probe to the next.
        displacement_dtype: None: that of the parameters. In bfloat16 small updates get lost in a long sum.

    Returns:
        The transform. Its updates are the very arrays that came in.

    Raises:
        ValueError: if an argument is out of range; from `init`, if nothing is selected, or a matrix is too
            small under "error"; from `update`, if the updates are not those of `init`, or there are adapters
            and no parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from opd_jax.transforms import subspace_summary
        >>> optimizer = optax.chain(optax.sgd(0.1), track_subspace(rank=2, every=1))
        >>> params = {"mlp": {"up": jnp.zeros((4, 3))}}
        >>> state = optimizer.init(params)
        >>> grads = {"mlp": {"up": jnp.outer(jnp.ones(4), jnp.array([3.0, 0.0, 4.0]))}}
        >>> updates, state = optimizer.update(grads, state, params)
        >>> print(round(float(subspace_summary(state, params)["mlp.up/spectral_norm"]), 4))  # 0.1 * 2 * 5
        1.0

    References:
        Cai et al., *Learning to Foresee*, `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    _check_arguments(rank, every, of, lock_in, on_small, lanczos, iterations)

    def init(params):
        if not jax.tree.leaves(params):  # optax.tree.map_params asks with a placeholder
            nothing = params if of == "displacement" else ()
            return TrackSubspaceState(_count(), _count(), jnp.zeros([]), nothing)
        found = select(params, matrices, "track_subspace")
        mesh = explicit_mesh(params)
        displacement = ()
        if of == "displacement":
            chosen = {matrix.index for matrix in found}
            leaves, treedef = jax.tree.flatten(params)
            leaves = [
                jnp.zeros_like(leaf, dtype=displacement_dtype) if i in chosen else jnp.zeros([], jnp.float32)
                for i, leaf in enumerate(leaves)
            ]
            displacement = jax.tree.unflatten(treedef, leaves)
        probes = tuple(_first(matrix, rank, on_small) for matrix in watched(found))
        probes = jax.tree.map(lambda a: laid_out(a, P(), mesh), probes)
        # Every leaf is an array of its own, so that the state can be donated.
        return TrackSubspaceState(_count(), _count(), probes, displacement)

    def watched(found):
        return found if of == "gradients" else paired(found)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        count = optax.safe_increment(state.track_count)
        if not jax.tree.leaves(updates):
            return updates, state._replace(track_count=count)
        found = select(updates, matrices, "track_subspace")
        seen = watched(found)
        check_state(seen, state.track_probes, rank)
        moved = leaves = jax.tree.leaves(updates)
        displacement = state.track_displacement
        if of == "displacement":
            moved, treedef = jax.tree.flatten(displacement)
            for matrix in found:
                total = moved[matrix.index]
                moved[matrix.index] = total + leaves[matrix.index].astype(total.dtype)
            displacement = jax.tree.unflatten(treedef, moved)
        probed = _probed(seen, params, leaves, moved)

        def look(probed, probes, count):
            xs = [_float32(matrix, arrays) for matrix, arrays in zip(seen, probed, strict=True)]
            return _look(xs, probes, count, lock_in, lanczos, iterations)

        def maybe(probed, probes, count, last):
            due = (count - 1) % every == 0
            probes = jax.lax.cond(due, look, lambda _, probes, __: probes, probed, probes, count)
            return probes, jnp.where(due, count, last)

        specs = jax.tree.map(lambda _: P(), (state.track_probes, state.track_step))
        probes, last = auto(maybe, specs, probed, state.track_probes, count, state.track_step)
        return updates, TrackSubspaceState(count, last, probes, displacement)

    return optax.GradientTransformationExtraArgs(init, update)


def _probed(seen: tuple[Matrix | Pair, ...], params: Any, updates: list, moved: list) -> list[tuple]:
    """The arrays that each matrix to be probed is made of."""
    if params is None and any(isinstance(matrix, Pair) for matrix in seen):
        raise ValueError("track_subspace: with low-rank adapters, update must be given the parameters")
    before = jax.tree.leaves(params)
    probed = []
    for matrix in seen:
        if isinstance(matrix, Pair):
            places = matrix.a.index, matrix.b.index
            probed.append(tuple(tuple(leaves[i] for i in places) for leaves in (before, updates, moved)))
        else:
            probed.append((moved[matrix.index],))
    return probed


def _float32(matrix: Matrix | Pair, arrays: tuple) -> jax.Array | Product:
    """What is probed, [S, m, n]."""
    if isinstance(matrix, Pair):
        return change(matrix, *arrays)
    return to_stack(arrays[0], matrix).astype(jnp.float32)


def _count() -> jax.Array:
    return jnp.zeros([], jnp.int32)


def _check_arguments(rank, every, of, lock_in, on_small, lanczos, iterations) -> None:
    for name, value in (("rank", rank), ("every", every), ("iterations", iterations)):
        if isinstance(value, int) and value < 1:
            raise ValueError(f"track_subspace: {name} must be at least 1, got {value}")
    for name, value, known in (
        ("of", of, ("updates", "gradients", "displacement")),
        ("on_small", on_small, ("clamp", "error")),
    ):
        if value not in known:
            raise ValueError(f"track_subspace: {name} must be one of {', '.join(known)}, got {value!r}")
    if isinstance(lock_in, float | int) and not 0 < lock_in <= 1:
        raise ValueError(f"track_subspace: lock_in must be in (0, 1], got {lock_in}")
    if lanczos is not None and not (len(lanczos) == 2 and min(lanczos) >= 1):
        raise ValueError(f"track_subspace: lanczos must be (probes, steps), both at least 1, got {lanczos}")


def _first(matrix: Matrix | Pair, rank: int, on_small: str) -> Probe:
    """Before any probe: a random right basis, no left one."""
    stack, m, n = matrix.shape
    k = min(rank, m, n)
    if k < rank:
        text = f"track_subspace: {matrix.name} is {m} x {n}, too small for rank {rank}"
        if on_small == "error":
            raise ValueError(text)
        warnings.warn(f"{text}; it is followed with rank {k}", stacklevel=4)
    right = _random_bases(matrix.a.index if isinstance(matrix, Pair) else matrix.index, stack, n, k)

    def zeros(*shape):
        return jnp.zeros((stack, *shape), jnp.float32)

    return Probe(
        left=zeros(m, k),
        right=right,
        first=zeros(m, k),
        values=zeros(k),
        norm=zeros(),
        energy=zeros(),
        effective_rank=zeros(),
        overlap=zeros(),
        first_overlap=zeros(),
        lock_in=jnp.full(stack, -1, jnp.int32),
    )


@partial(jax.jit, static_argnums=(1, 2, 3))  # else an `init` outside of jit compiles each operation by itself
def _random_bases(seed: ArrayLike, stack: int, n: int, k: int) -> jax.Array:
    keys = jax.random.split(jax.random.key(seed), stack)
    return jax.vmap(lambda key: spectrum.cholesky_qr2(jax.random.normal(key, (n, k), jnp.float32)))(keys)


def check_state(found: tuple[Matrix | Pair, ...], probes: tuple[Probe, ...], rank: int) -> None:
    have = [(p.left.shape[0], p.left.shape[1], p.right.shape[1]) for p in probes]
    want = [matrix.shape for matrix in found]
    ranks = [probe.right.shape[2] for probe in probes]
    if have == want and rank and ranks != [min(rank, *shape[1:]) for shape in want]:
        raise ValueError(f"track_subspace: rank is {rank}, but the state follows {ranks} directions")
    if have != want:
        names = ", ".join(f"{matrix.name} {list(matrix.shape)}" for matrix in found)
        raise ValueError(
            f"track_subspace: the updates' matrices are {names}; those at init had the shapes "
            f"{[list(shape) for shape in have]}; after a change of the parameters call init again"
        )


def _look(
    xs: list[jax.Array | Product],
    old: tuple[Probe, ...],
    count: jax.Array,
    lock_in: float,
    lanczos,
    iterations: int,
) -> tuple[Probe, ...]:
    """One look at all x [S, m, n]; together, so that little is compiled."""
    norms = [product_norm(x) if isinstance(x, Product) else spectrum.frobenius_norm(x) for x in xs]
    fresh = [jnp.all(probe.first == 0, axis=(1, 2)) for probe in old]
    cold = jnp.concatenate([f & (norm > 0) for f, norm in zip(fresh, norms, strict=True)]).any()
    found = jax.lax.fori_loop(
        0,
        jnp.where(cold, jnp.maximum(iterations, 4), iterations),
        lambda _, found: subspace_steps(xs, [f.right for f in found]),
        [spectrum.Subspace(probe.left, probe.values, probe.right) for probe in old],
    )
    return tuple(
        _probe(*parts, count, lock_in, lanczos) for parts in zip(xs, norms, found, fresh, old, strict=True)
    )


def _probe(
    x: jax.Array | Product,
    norm: jax.Array,
    found: spectrum.Subspace,
    fresh: jax.Array,
    old: Probe,
    count: jax.Array,
    lock_in: float,
    lanczos,
) -> Probe:
    """What is known of x [S, m, n] after a look."""
    known = norm > 0
    overlap = jnp.where(fresh, 0.0, spectrum.subspace_overlap(old.left, found.left))
    first = jnp.where((fresh & known)[:, None, None], found.left, old.first)
    held = overlap >= lock_in
    new = Probe(
        left=found.left,
        right=found.right,
        first=first,
        values=found.singular_values,
        norm=norm,
        energy=spectrum.energy(found.singular_values, norm),
        effective_rank=_effective_rank(x, found, norm, lanczos),
        overlap=overlap,
        first_overlap=spectrum.subspace_overlap(first, found.left),
        lock_in=jnp.where(held, jnp.where(old.lock_in < 0, count, old.lock_in), -1),
    )
    # A zero or broken update says nothing: the bases stay as they are.
    keep = known & jnp.isfinite(norm)
    bases = ("left", "right", "first", "overlap", "first_overlap", "lock_in")
    held_back = {
        name: jnp.where(keep.reshape(-1, *[1] * (value.ndim - 1)), value, getattr(old, name))
        for name, value in new._asdict().items()
        if name in bases
    }
    return new._replace(**held_back)


def _effective_rank(x: jax.Array | Product, found: spectrum.Subspace, norm: jax.Array, lanczos) -> jax.Array:
    low_rank = isinstance(x, Product)
    if lanczos is not None and not low_rank:
        probes, steps = lanczos
        return spectrum.effective_rank_estimate(x, found, probes=probes, steps=steps)
    values = found.singular_values
    m, n = found.left.shape[-2], found.right.shape[-2]
    rest = (min(m, n, x.right.shape[-2]) if low_rank else min(m, n)) - values.shape[-1]
    if rest <= 0:
        return spectrum.effective_rank(values)
    left_over = jnp.maximum(1.0 - spectrum.energy(values, norm), 0.0)
    flat = norm * jnp.sqrt(left_over / rest)
    return spectrum.effective_rank(
        jnp.concatenate([values, jnp.broadcast_to(flat[:, None], (len(flat), rest))], axis=-1)
    )
