r"""What of an update :math:`\Delta W = W - W_\mathrm{base}` matters: edited weights, by pure functions.

All take trees of numpy or JAX arrays with the same names and shapes: a `Decoder`, its `nnx.State`, a mapping
of Hugging Face names, or any other tree; all return a tree like `tuned` of numpy arrays. An edit is computed
on the host in float32, by numpy, and rounded to the wider of the two dtypes; a tensor, or a layer of a stack,
that an edit takes from one of the trees is that tree's, bit for bit.
"""

import math
import numbers
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from opd_jax.analysis._names import place_of
from opd_jax.analysis._spectra import numerical_rank
from opd_jax.analysis._trees import (
    BLOCKS,
    depth,
    edited,
    groups,
    is_matrix,
    labels,
    norm,
    pairs,
    update_of,
    wide,
)

EMBEDDINGS = ("embedding", "head")


def scale(base: Any, tuned: Any, alpha: float) -> Any:
    r"""The update made smaller or larger.

    .. math:: W = W_\mathrm{base} + \alpha\, \Delta W

    alpha = 0 gives the base and alpha = 1 the tuned weights, bit for bit.

    Args:
        base: weights that training began from.
        tuned: weights that it led to.
        alpha: any finite number.

    Raises:
        ValueError: if alpha is not finite, or the trees do not fit.

    Example:
        >>> import numpy as np
        >>> print(scale({"up": np.zeros((1, 2), np.float32)}, {"up": np.array([[2.0, 4.0]])}, 0.5)["up"])
        [[1. 2.]]

    References:
        Cai et al., `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    alpha = _finite("alpha", alpha)

    def change(_: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        if alpha in (0, 1):  # before + (after - before) need not be after
            return after if alpha else before
        return wide(before) + alpha * update_of(before, after)

    return edited(base, tuned, change, "scale")


def swap(base: Any, tuned: Any, modules: Collection[str] = EMBEDDINGS) -> Any:
    """The tuned weights with the base's embeddings: those of the input, and of the output if it has its own.

    Args:
        base: weights that training began from.
        tuned: weights that it led to.
        modules: "embedding" (of the input; of both where they are tied), "head" (of the output), or both.

    Raises:
        ValueError: if the model has no such embedding, or the trees do not fit.
    """
    modules = (modules,) if isinstance(modules, str) else tuple(modules)
    if not modules or set(modules) - set(EMBEDDINGS):
        raise ValueError(f"swap: modules must be of {EMBEDDINGS}, got {modules}")
    return _without(base, tuned, set(modules), "swap")


def leave_out(base: Any, tuned: Any, module: str) -> Any:
    """The tuned weights with the base's in place of one module's, in all layers.

    Args:
        base: weights that training began from.
        tuned: weights that it led to.
        module: "q", "k", "v", "o", "gate", "up", "down" (with their biases), "attention" or "mlp" for all of
            these, "embedding", "head", or "other", such as norms.

    Raises:
        ValueError: if the model has no such module, or the trees do not fit.
    """
    return _without(base, tuned, {module}, "leave_out")


def inject(base: Any, tuned: Any, layers: Iterable[int], kind: str = "mlp") -> Any:
    r"""The base with the update of some layers' MLP, or attention, and of nothing else.

    .. math:: W_i = W_{\mathrm{base}, i} + \Delta W_i \; [i \in \mathcal W_l], \qquad
        \mathcal W_l = \{i : |i - l| \le h\} \text{, see `window`}

    Args:
        base: weights that training began from.
        tuned: weights that it led to.
        layers: numbers, from 0.
        kind: "mlp" or "attention": the linear maps with their biases. Norms stay the base's.

    Raises:
        ValueError: if the kind is unknown, there is no such layer, or none is given, or the trees do not fit.

    References:
        Cai et al., `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    if kind not in BLOCKS:
        raise ValueError(f"inject: kind must be 'mlp' or 'attention', got {kind!r}")
    chosen, count = set(layers), depth(base)
    if not chosen or not chosen <= set(range(count)):
        raise ValueError(f"inject: layers must be of 0 .. {count - 1}, at least one, got {sorted(chosen)}")

    def change(name: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return after if place_of(name).layer in chosen and kind in labels(name) else before

    return edited(base, tuned, change, "inject")


def window(centre: int, half_width: int, layers: int) -> range:
    """The layers around one of them, cut at both ends of the model.

    Raises:
        ValueError: if the half-width is negative, or the centre is no layer.

    Example:
        >>> [list(window(centre, 1, 4)) for centre in range(4)]
        [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    """
    if not isinstance(half_width, numbers.Integral) or half_width < 0:
        raise ValueError(f"half-width must be an integer >= 0, got {half_width}")
    if not 0 <= centre < layers:
        raise ValueError(f"the centre of a window must be of 0 .. {layers - 1}, got {centre}")
    return range(max(0, centre - half_width), min(layers, centre + half_width + 1))


def truncate(
    base: Any,
    tuned: Any,
    *,
    top: float | None = None,
    bottom: float | None = None,
    match_norm: bool = False,
    factors: "Factors | None" = None,
) -> Any:
    r"""The base with the leading, or the trailing, singular components of every matrix's update.

    .. math:: \Delta W = \sum_{i \le r} s_i u_i v_i^\top, \qquad
        W = W_\mathrm{base} + c \sum_{i \in K} s_i u_i v_i^\top

    K are the first, or the last, k = ceil(p r / 100) of the r components above the numerical rank's threshold
    (see `geometry`), and c is 1, or ||Delta W||_F / ||sum_K||_F where norms are matched. Embeddings are
    matrices, too. Vectors (norms, biases) have no spectrum: they are the tuned ones, so that top=0 is the
    control that has nothing else of training.

    Args:
        base: weights that training began from.
        tuned: weights that it led to.
        top: p, percent of the components, from 0 to 100.
        bottom: p, likewise; exactly one of the two is given.
        match_norm: give each matrix's update the Frobenius norm it had before.
        factors: keeps decompositions between calls on the same weights.

    Raises:
        ValueError: if a percentage is out of range, not one of the two is given, an update is not finite, or
            the trees do not fit.

    References:
        Cai et al., `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    if (top is None) == (bottom is None):
        raise ValueError(f"truncate: give top or bottom, one of them; got top={top}, bottom={bottom}")
    percent = _finite("percent", top if bottom is None else bottom)
    if not 0 <= percent <= 100:
        raise ValueError(f"truncate: a percentage must be from 0 to 100, got {percent:g}")
    factors = Factors(0) if factors is None else factors

    def change(name: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        if not is_matrix(name, after):
            return after
        update = update_of(before, after)
        if not update.any():
            return before
        u, s, vt, rank = factors(name, update)
        k = math.ceil(percent * rank / 100 * (1 - 1e-12))  # 7 percent of 100 are not above 7
        kept = slice(0, k) if bottom is None else slice(rank - k, rank)
        part = (u[:, kept] * s[kept]) @ vt[kept]
        if match_norm and k:
            part *= np.linalg.norm(s) / np.linalg.norm(s[kept])
        return wide(before) + part.astype(update.dtype)

    return edited(base, tuned, change, "truncate")


def match_norms(base: Any, early: Any, final: Any, beta: float = 1.0) -> Any:
    r"""Every tensor's update at an early checkpoint, its norm moved towards the final one's.

    .. math:: W = W_\mathrm{base} + \Delta W_e \Bigl(1 + \beta\,
        \frac{\|\Delta W_f\|_F - \|\Delta W_e\|_F}{\|\Delta W_e\|_F}\Bigr)

    with the updates e of the early and f of the final checkpoint. beta = 0 gives the early weights, bit for
    bit; beta = 1 matches the norm. A tensor that has not moved early has no direction and stays the base's.

    Args:
        base: weights that training began from.
        early: weights of an early checkpoint.
        final: weights of the last one.
        beta: any finite number.

    Raises:
        ValueError: if beta is not finite, or the trees do not fit.

    References:
        Cai et al., `arXiv:2605.11739 <https://arxiv.org/abs/2605.11739>`_
    """
    beta = _finite("beta", beta)
    finals = {part.name: part for part in pairs(base, final, "match_norms")}

    def change(name: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        update, final = update_of(before, after), finals[name]
        size = norm(update)
        if beta == 0 or size == 0:
            return after
        return wide(before) + (1 + beta * (norm(update_of(final.before, final.after)) - size) / size) * update

    return edited(base, early, change, "match_norms")


class Factors:
    """Singular value decompositions in float64, kept by name as long as they fit.

    Args:
        budget: bytes; what does not fit is computed anew at every call.
    """

    def __init__(self, budget: int = 4 << 30):
        self._kept, self._left = {}, budget

    def __call__(self, name: str, update: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """U [m, r'], s [r'], V^T [r', n] and the numerical rank r <= r' of an update [m, n]."""
        if name in self._kept:
            return self._kept[name]
        if not np.isfinite(update).all():
            raise ValueError(f"the update of {name} holds NaN or infinity")
        u, s, vt = np.linalg.svd(update.astype(np.float64), full_matrices=False)
        found = u, s, vt, numerical_rank(s, update.shape)
        size = u.nbytes + vt.nbytes
        if size <= self._left:
            self._kept[name], self._left = found, self._left - size
        return found


def _without(base: Any, tuned: Any, wanted: set[str], who: str) -> Any:
    """The tuned weights with the base's where a tensor has one of the labels."""
    known = groups(base)
    if not wanted & set(known):
        raise ValueError(f"{who}: the model has no {' or '.join(sorted(wanted))}; it has {', '.join(known)}")

    def change(name: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return before if wanted & labels(name) else after

    return edited(base, tuned, change, who)


def _finite(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)
