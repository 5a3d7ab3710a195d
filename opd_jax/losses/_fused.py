"""Divergences from hidden states: the logits of a few tokens at a time, of both models, and never more.

The softmax's input is the largest array of a language model's loss: 4,096 tokens of 152,000 logits are
2.5 GB, times two models, times what differentiation keeps. Here a chunk of tokens is unembedded, compared
and forgotten; gradients are written by hand so that nothing of size [tokens, V] is kept for them, and the
unembedding's own gradient is accumulated in place.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from jax.typing import ArrayLike

from opd_jax.losses._inputs import check_temperature, common_size

Divergence = Callable[..., Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unembedding:
    r"""What turns hidden states into logits.

    .. math:: z = c \tanh((W^\top h + b) / c)

    Attributes:
        kernel: W, [D, V], or [V, D] if `transposed` (a tied embedding).
        bias: b, [V], or None.
        softcap: c as a number, or None for z = W h + b (Gemma 2 has 30).
        transposed: whether the kernel is [V, D].
    """

    kernel: jax.Array
    bias: jax.Array | None = None
    softcap: float | None = field(default=None, metadata={"static": True})
    transposed: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(D, V)."""
        return self.kernel.shape[::-1] if self.transposed else self.kernel.shape


def fused(
    divergence: Divergence,
    student_hidden: ArrayLike,
    student: Unembedding | ArrayLike,
    teacher_hidden: ArrayLike,
    teacher: Unembedding | ArrayLike,
    *,
    chunk: int = 256,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    where: ArrayLike | None = None,
    per_token: Any = None,
) -> jax.Array:
    r"""A divergence per token, from hidden states and unembeddings, a chunk of tokens at a time.

    Equal to ``divergence(log_softmax(student logits), log_softmax(teacher logits))`` in value and gradient.
    The logits of a chunk are computed in the forward and once more in the backward pass; no other array
    of the program has more than chunk x V elements. Where the loss is a weighted sum of tokens,
    `fused_sum` gives the same gradient without the second computation.

    Args:
        divergence: of log-probabilities [..., V] float32: (student, teacher) -> [...], or with `per_token`
            (student, teacher, per_token) -> [...]; options through `functools.partial`. It must treat
            tokens independently of each other, and close over no traced arrays.
        student_hidden: what is unembedded, [..., T, D].
        student: its unembedding, or only the kernel [D, V].
        teacher_hidden: [..., T, D'].
        teacher: its unembedding, or only the kernel [D', V'].
        chunk: tokens whose logits exist at a time, at least one of each row: chunks are cut along T with
            all leading axes kept, so that what is sharded over a batch axis stays so.
        temperature: of both models, see `log_softmax`.
        vocabulary: tokens compared, from the first; None: all that both have.
        where: 1 where a token counts, [..., T]; elsewhere value and gradient are 0 whatever the inputs.
        per_token: a pytree of arrays [..., T, ...], cut like the hidden states; without gradient.

    Returns:
        [..., T] float32. Its gradient flows to `student_hidden` and `student` alone; that of the kernel is
        summed in float32 and then has the kernel's dtype.

    Raises:
        ValueError: if the shapes do not fit, or `chunk`, `temperature` or `vocabulary` is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from opd_jax.losses import reverse_kl
        >>> h, w, th, tw = (jax.random.normal(jax.random.key(i), s)
        ...     for i, s in enumerate([(5, 4), (4, 9), (5, 3), (3, 9)]))
        >>> dense = reverse_kl(jax.nn.log_softmax(h @ w), jax.nn.log_softmax(th @ tw))
        >>> print(jnp.allclose(fused(reverse_kl, h, w, th, tw, chunk=2), dense))
        True

    References:
        Wijmans et al., *Cut Your Losses*, `arXiv:2411.09009 <https://arxiv.org/abs/2411.09009>`_;
        Hsu et al., *Liger Kernel*, `arXiv:2410.10989 <https://arxiv.org/abs/2410.10989>`_
    """
    spec, inputs, shape = _prepare(
        divergence,
        (student_hidden, student, teacher_hidden, teacher),
        (chunk, temperature, vocabulary),
        where,
        per_token,
    )
    return _join(_per_token(spec, *inputs), shape)


def fused_sum(
    divergence: Divergence,
    weights: ArrayLike,
    student_hidden: ArrayLike,
    student: Unembedding | ArrayLike,
    teacher_hidden: ArrayLike,
    teacher: Unembedding | ArrayLike,
    *,
    chunk: int = 256,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    where: ArrayLike | None = None,
    per_token: Any = None,
) -> tuple[jax.Array, Any]:
    r"""The weighted sum of a divergence over tokens, and the tokens' values, with one unembedding a chunk.

    .. math:: \sum_t w_t D_t

    Since the weights are known beforehand, the gradient of a chunk is computed together with its value;
    see `fused` for everything else.

    Args:
        divergence: as for `fused`. It may return (loss, extra) instead: `extra`, a pytree of arrays
            [..., ...], is handed through without gradient, for statistics.
        weights: of each token, [..., T]; without gradient. `aggregation_weights` makes a mean of the sum.
        student_hidden: [..., T, D].
        student: its unembedding, or only the kernel [D, V].
        teacher_hidden: [..., T, D'].
        teacher: its unembedding, or only the kernel [D', V'].
        chunk: as for `fused`.
        temperature: as for `fused`.
        vocabulary: as for `fused`.
        where: as for `fused`; `extra` is computed as for hidden states of 0 where it is 0.
        per_token: as for `fused`.

    Returns:
        The sum, a float32 scalar; and what the divergence returned, for all tokens, without gradient.

    Raises:
        ValueError: if the shapes do not fit, or `chunk`, `temperature` or `vocabulary` is out of range.
    """
    spec, inputs, shape = _prepare(
        divergence,
        (student_hidden, student, teacher_hidden, teacher),
        (chunk, temperature, vocabulary),
        where,
        per_token,
    )
    weights = jnp.asarray(weights, jnp.float32)
    if weights.shape != shape:
        raise ValueError(f"weights must have the tokens' shape {shape}, got {weights.shape}")
    total, outputs = _weighted(spec, _cut(lax.stop_gradient(weights), shape, spec.width), *inputs)
    return total, jax.tree.map(lambda a: _join(a, shape), lax.stop_gradient(outputs))


@dataclass(frozen=True)
class _Spec:
    """What is known when the program is made."""

    divergence: Divergence
    temperature: float
    shared: int
    width: int  # tokens of each row in a chunk


def _prepare(divergence, models, options, where, per_token):
    """Checks; cuts everything into [chunks, B, width, ...]; (spec, inputs, shape of the tokens)."""
    hidden, head, teacher_hidden, teacher_head = models
    chunk, temperature, vocabulary = options
    hidden, teacher_hidden = jnp.asarray(hidden), jnp.asarray(teacher_hidden)
    heads = [h if isinstance(h, Unembedding) else Unembedding(jnp.asarray(h)) for h in (head, teacher_head)]
    for name, states, unembedding in zip(
        ("student", "teacher"), (hidden, teacher_hidden), heads, strict=True
    ):
        _check(name, states, unembedding)
    shape = hidden.shape[:-1]
    if shape != teacher_hidden.shape[:-1] or not shape:
        raise ValueError(
            "student and teacher must have hidden states of the same tokens, [..., T, D] and [..., T, D'];"
            f" got {hidden.shape} and {teacher_hidden.shape}"
        )
    for leaf in jax.tree.leaves((where, per_token)):
        if jnp.shape(leaf)[: len(shape)] != shape:
            raise ValueError(f"where and per_token must start with {shape}, got {jnp.shape(leaf)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    check_temperature(temperature)
    shared = common_size(heads[0].shape[1], heads[1].shape[1], vocabulary)
    rows = math.prod(shape[:-1])
    width = max(1, min(shape[-1], chunk // max(rows, 1)))
    spec = _Spec(divergence, temperature, shared, width)
    counts = None if where is None else jnp.asarray(where, bool)
    if counts is not None:  # before it is used: a NaN there must reach no gradient
        hidden, teacher_hidden = (jnp.where(counts[..., None], h, 0) for h in (hidden, teacher_hidden))
    cut = partial(jax.tree.map, lambda a: _cut(jnp.asarray(a), shape, width))
    rest = lax.stop_gradient((cut(teacher_hidden), heads[1], cut(counts), cut(per_token)))
    return spec, (cut(hidden), heads[0], rest), shape


def _check(name: str, hidden: jax.Array, head: Unembedding) -> None:
    if head.kernel.ndim != 2 or hidden.ndim < 2 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(
            f"the {name}'s hidden states {hidden.shape} do not fit its kernel {head.kernel.shape}: they must"
            f" be [..., T, D] and {'[V, D]' if head.transposed else '[D, V]'}"
        )
    if head.bias is not None and head.bias.shape != (head.shape[1],):
        raise ValueError(f"the {name}'s bias must be [{head.shape[1]}], got {list(head.bias.shape)}")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"the {name}'s softcap must be positive, got {head.softcap}")


def _cut(a: jax.Array, shape: tuple[int, ...], width: int) -> jax.Array:
    """[..., T, ...] -> [chunks, B, width, ...], padded with zeros."""
    rest = a.shape[len(shape) :]
    rows, count = math.prod(shape[:-1]), shape[-1]
    chunks = math.ceil(count / width)
    a = a.reshape(rows, count, *rest)
    a = jnp.pad(a, [(0, 0), (0, chunks * width - count)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(a.reshape(rows, chunks, width, *rest), 1, 0)


def _join(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_cut`."""
    rest = a.shape[3:]
    a = jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *rest)
    return a[:, : shape[-1]].reshape(*shape, *rest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_token(spec: _Spec, hidden, head: Unembedding, rest):
    teacher_hidden, teacher_head, *pieces = rest

    def chunk(piece):
        states, teacher_states, *piece = piece
        loss, _ = _compare(spec, head, teacher_head, piece)(
            _project(states, head), _project(teacher_states, teacher_head)
        )
        return loss

    return lax.map(chunk, (hidden, teacher_hidden, *pieces))


def _per_token_forward(spec, hidden, head, rest):
    return _per_token(spec, hidden, head, rest), (hidden, head, rest)


def _per_token_backward(spec, residuals, cotangents):
    *gradients, _ = _gradients(spec, cotangents, *residuals, with_values=False)
    return *gradients, None


_per_token.defvjp(_per_token_forward, _per_token_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(spec: _Spec, weights, hidden, head: Unembedding, rest):
    teacher_hidden, teacher_head, *pieces = rest

    def chunk(piece):
        states, teacher_states, weights, *piece = piece
        loss, outputs = _compare(spec, head, teacher_head, piece)(
            _project(states, head), _project(teacher_states, teacher_head)
        )
        return jnp.sum(weights * loss), outputs

    sums, outputs = lax.map(chunk, (hidden, teacher_hidden, weights, *pieces))
    return sums.sum(), outputs


def _weighted_forward(spec, weights, hidden, head, rest):
    *gradients, (losses, outputs) = _gradients(spec, weights, hidden, head, rest, with_values=True)
    return (jnp.sum(weights * losses), outputs), gradients


def _weighted_backward(_spec, gradients, cotangents):
    scale, _ = cotangents  # the outputs' is 0
    return None, *jax.tree.map(lambda g: (scale * g).astype(g.dtype), tuple(gradients)), None


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _gradients(spec, weights, hidden, head: Unembedding, rest, with_values: bool):
    """Those of the weighted sum in the hidden states and the unembedding; and (losses, outputs), or None."""
    teacher_hidden, teacher_head, *pieces = rest

    def chunk(sums, piece):
        states, teacher_states, weights, *piece = piece
        compare = _compare(spec, head, teacher_head, piece)
        raw, teacher_raw = _project(states, head), _project(teacher_states, teacher_head)
        # First and alone: sharing what the gradient needs would keep it for longer.
        values = compare(raw, teacher_raw) if with_values else None
        raw, teacher_raw, values = lax.optimization_barrier((raw, teacher_raw, values))
        _, pullback, _ = jax.vjp(lambda raw: compare(raw, teacher_raw), raw, has_aux=True)
        (raw_gradient,) = pullback(weights)
        to_states, to_head = _project_gradient(sums, raw_gradient, states, head)
        return to_head, (to_states, values)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), head)
    sums, (to_hidden, values) = lax.scan(chunk, zeros, (hidden, teacher_hidden, weights, *pieces))
    to_head = jax.tree.map(lambda g, a: g.astype(a.dtype), sums, head)
    return to_hidden, to_head, values


def _compare(spec: _Spec, head: Unembedding, teacher_head: Unembedding, piece) -> Callable:
    """(student's, teacher's products of hidden states and kernel) -> (loss, outputs) of a chunk."""
    counts, per_token = piece

    def compare(raw, teacher_raw):
        log_probs = (_log_probs(raw, head, spec), _log_probs(teacher_raw, teacher_head, spec))
        outputs = spec.divergence(*log_probs, *(() if per_token is None else (per_token,)))
        loss = outputs[0] if isinstance(outputs, tuple) else outputs
        if counts is not None:
            loss = jnp.where(counts, loss, 0.0)
            outputs = (loss, *outputs[1:]) if isinstance(outputs, tuple) else loss
        return loss, lax.stop_gradient(outputs)

    return compare


def _log_probs(raw: jax.Array, head: Unembedding, spec: _Spec) -> jax.Array:
    if head.softcap is not None:
        raw = head.softcap * jnp.tanh(raw / head.softcap)
    raw = raw[..., : spec.shared]
    logits = raw if spec.temperature == 1.0 else raw / spec.temperature
    # As jax.nn.log_softmax, but the shift is written twice: XLA's CPU backend would fuse a single one into
    # the product, which then takes twice the time and copies of both kernels.
    most = lax.stop_gradient(logits.max(-1, keepdims=True))
    total = jnp.exp(logits - most).sum(-1, keepdims=True)
    return (logits - lax.optimization_barrier(most)) - jnp.log(total)


def _project(states: jax.Array, head: Unembedding) -> jax.Array:
    """[B, n, D] -> [B, n, V] float32, before soft-capping."""
    out = _contract(states.astype(head.kernel.dtype), head.kernel, 2, 1 if head.transposed else 0)
    return out if head.bias is None else out + head.bias.astype(jnp.float32)


def _project_gradient(sums: Unembedding, gradient: jax.Array, states: jax.Array, head: Unembedding):
    """From the gradient [B, n, V] in the product: that of the states, and `sums` with that of the head added.

    As in the decoder, factors are rounded to the kernel's dtype and products summed in float32.
    """
    narrow = gradient.astype(head.kernel.dtype)
    to_states = _contract(narrow, head.kernel, 2, 0 if head.transposed else 1).astype(states.dtype)
    narrow = narrow.reshape(-1, narrow.shape[-1])
    flat = states.astype(head.kernel.dtype).reshape(-1, states.shape[-1])
    rows, columns = (narrow, flat) if head.transposed else (flat, narrow)
    kernel = lax.platform_dependent(sums.kernel, rows, columns, cpu=_add_blocks, default=_add)
    bias = None if sums.bias is None else sums.bias + gradient.sum((0, 1))
    return to_states, replace(sums, kernel=kernel, bias=bias)


def _add(total: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """total + rows^T columns, [R, C] from [n, R] and [n, C]."""
    place = jax.typeof(total).sharding  # on an Explicit mesh, the sum over devices that hold other rows
    explicit = AxisType.Explicit in place.mesh.axis_types
    return total + _contract(_transpose(rows), columns, 1, 0, place if explicit else None)


def _add_blocks(total: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The same, some rows of the total at a time.

    XLA's CPU backend writes a product to memory before it adds it; other backends add as they multiply.
    """
    count, width = total.shape
    most = max(1, max(rows.size, columns.size) // width)
    block = max(b for b in range(1, min(count, most) + 1) if count % b == 0)
    if 4 * block < min(count, most):  # no divisor near: small products would cost more than the memory
        return _add(total, rows, columns)

    def add(i, total):
        part = lax.dynamic_slice_in_dim(rows, i * block, block, axis=1)
        old = lax.dynamic_slice_in_dim(total, i * block, block, axis=0)
        return lax.dynamic_update_slice_in_dim(total, _add(old, part, columns), i * block, axis=0)

    return lax.fori_loop(0, count // block, add, total)


def _transpose(x: jax.Array) -> jax.Array:
    """Written out row by row for bfloat16: XLA's CPU backend is slow at products of transposed factors."""
    return x.T if x.dtype == jnp.float32 else with_layout_constraint(x.T, Layout((0, 1)))


def _contract(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, place: Any = None) -> jax.Array:
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32, out_sharding=place)
