"""Weight-only int8: matrices of models that do not change, at half of bfloat16's bytes.

A matrix W is kept as int8 q with one float32 scale s per output channel c (a column of a kernel [in, out],
a row of the embedding [V, D]): s_c = max |W_c| / 127, q = round(W / s), so that |W - q s| <= s / 2.
Products run in bfloat16, x W ~ (x q) s: whole numbers up to 127 are exact there, and the scale is applied to
the float32 sum. Norms and biases stay bfloat16.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opd_jax.models._layers import Linear
from opd_jax.models._names import Parameter, Path

_PIECE = 2**26  # elements that are quantised at a time where a matrix is not one of a stack


def is_int8(model: nnx.Module) -> bool:
    """Whether the model's matrices are int8."""
    return any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(nnx.state(model)))


def with_int8(model: nnx.Module) -> nnx.Module:
    """`model`, a bfloat16 `Decoder`, with its matrices replaced by quantised ones; for tracing alone: of a
    real model, `load` never has the bfloat16 weights whole."""
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, Linear):
            axes = module.kernel.get_metadata()["axes"]
            q, scale = quantise(module.kernel.get_value(), -2)
            module.kernel, module.kernel_scale = nnx.Param(q, axes=axes), nnx.Param(scale, axes=axes[1:])
        elif not path:
            axes = module.embedding.get_metadata()["axes"]
            q, scale = quantise(module.embedding.get_value(), -1)
            module.embedding, module.embedding_scale = (
                nnx.Param(q, axes=axes),
                nnx.Param(scale, axes=axes[:1]),
            )
    return model


def quantise(weights, axis: int) -> tuple[jax.Array, jax.Array]:
    """(q, scale without `axis`), each vector along `axis` with a scale of its own."""
    wide = weights.astype(jnp.float32)
    scale = _scale(jnp.max(jnp.abs(wide), axis=axis))
    return _round(wide, jnp.expand_dims(scale, axis)), scale


def scale_path(path: Path) -> Path:
    """Where the scales of the matrix at `path` are."""
    return (*path[:-1], f"{path[-1]}_scale")


class Quantiser:
    """The parts of one stored matrix (or of a stack), as int8 and scales.

    Two readings: the first finds the scales of the channels that are asked for, the second rounds. Each holds
    one layer's matrix (or 2^26 elements) in float32, besides what it returns.

    Args:
        parameter: which it is.
        read: gives any part of it, as float32.
        where: the name of its file, for errors.
    """

    def __init__(self, parameter: Parameter, read: Callable[[tuple[slice, ...]], np.ndarray], where: str):
        self._read, self._where = read, where
        self._shape, self._stacked = parameter.shape, parameter.stacked
        # Channels are the columns of a kernel [.., in, out] and the rows of the embedding [V, D].
        self._inner, self._channel = (-2, -1) if parameter.transposed else (-1, -2)
        self._scales: dict[tuple, np.ndarray] = {}

    def scales(self, index: tuple[slice, ...]) -> np.ndarray:
        """The scales of the channels in `index`: [L, channels] or [channels] float32."""
        key = tuple((i.start, i.stop) for i in index)
        if key not in self._scales:
            found = np.empty([i.stop - i.start for i in index], np.float32)
            whole = self._with_inner(index, slice(0, self._shape[self._inner]))
            for place, piece in self._pieces(whole):
                highest = np.abs(self._read(piece)).max(self._inner)
                if not np.isfinite(highest).all():
                    raise ValueError(f"{self._where} holds a value that is not finite: it cannot become int8")
                found[self._without_inner(place)] = _scale(highest)
            self._scales[key] = found
        return self._scales[key]

    def values(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of the matrix, int8."""
        scales = np.expand_dims(self.scales(self._without_inner(index)), self._inner)
        out = np.empty([i.stop - i.start for i in index], np.int8)
        for place, piece in self._pieces(index):
            out[place] = _round(self._read(piece), scales[self._with_inner(self._without_inner(place))])
        return out

    def _pieces(self, index: tuple[slice, ...]):
        """(place in the part, index in the whole) of pieces that fit the memory: layers, or some channels."""
        axis = 0 if self._stacked else self._channel % len(index)
        step = 1 if self._stacked else max(1, _PIECE // self._shape[self._inner])
        first = index[axis].start
        for start in range(first, index[axis].stop, step):
            stop = min(start + step, index[axis].stop)
            place = [slice(None)] * len(index)
            place[axis] = slice(start - first, stop - first)
            yield tuple(place), (*index[:axis], slice(start, stop), *index[axis + 1 :])

    def _without_inner(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        at = self._inner % len(self._shape)
        return (*index[:at], *index[at + 1 :])

    def _with_inner(self, index: tuple[slice, ...], inner: slice = slice(None)) -> tuple[slice, ...]:
        at = self._inner % len(self._shape)
        return (*index[:at], inner, *index[at:])


def _scale(highest):
    """absmax / 127; 1 where all is 0."""
    xp = np if isinstance(highest, np.ndarray) else jnp
    return xp.where(highest > 0, highest / np.float32(127), np.float32(1))


def _round(weights, scale):
    xp = np if isinstance(weights, np.ndarray) else jnp
    return xp.rint(xp.clip(weights / scale, -127, 127)).astype(xp.int8)
