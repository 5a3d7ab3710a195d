"""The pieces of a decoder block. Parameters carry the logical names of their axes."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint

ONE_HOT_VOCABULARY = 512


def matmul(x: Array, kernel: Array) -> Array:
    """`x @ kernel`, accumulated in float32 and rounded to the dtype of `x`.

    Args:
        x: [..., in].
        kernel: [in, out], of the same dtype.

    Returns:
        [..., out].
    """
    return project(x, kernel).astype(x.dtype)


def project(x: Array, kernel: Array, transposed: bool = False, scale: Array | None = None) -> Array:
    """`x @ kernel`, or `x @ kernel.T` if `transposed`: [..., out] float32; times `scale` [out], if the kernel
    is int8."""
    if scale is not None:
        # Tied to x, it is widened where it is used: XLA would keep a wide copy outside of a loop over
        # chunks, and gather that one.
        x, kernel = lax.optimization_barrier((x, kernel))
        kernel = kernel.astype(x.dtype)
    product = _product if x.dtype == jnp.float32 else _narrow_product
    out = product(x.reshape(-1, x.shape[-1]), kernel, transposed)
    out = out if scale is None else out * scale
    return out.reshape(*x.shape[:-1], out.shape[-1])


def value(variable: nnx.Variable | None) -> Array | None:
    """The array of a variable that may not be there."""
    return None if variable is None else variable[...]


def _product(x: Array, kernel: Array, transposed: bool) -> Array:
    return _contract(x, kernel, 1, 1 if transposed else 0)


def _contract(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


# JAX's own transpose of a product with a wider output contracts a float32 cotangent with a
# bfloat16 operand, which no hardware does at bfloat16 speed. Here the cotangent is rounded first.
_narrow_product = jax.custom_vjp(_product, nondiff_argnums=(2,))


def _narrow_forward(x: Array, kernel: Array, transposed: bool):
    return _product(x, kernel, transposed), (x, kernel)


def _narrow_backward(transposed: bool, residuals, cotangent):
    x, kernel = residuals
    cotangent = cotangent.astype(x.dtype)
    to_x = _contract(cotangent, kernel, 1, 0 if transposed else 1)
    rows, columns = (cotangent, x) if transposed else (x, cotangent)
    to_kernel = _contract(_transpose(rows), columns, 1, 0)
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype)


_narrow_product.defvjp(_narrow_forward, _narrow_backward)


def _transpose(x: Array) -> Array:
    """`x.T`, on CPU laid out anew: XLA has its fast bfloat16 product for that layout only."""
    return lax.platform_dependent(
        x,
        cpu=lambda x: with_layout_constraint(x.T, Layout((0, 1))),
        default=lambda x: x.T,
    )


def lookup_int8(embedding: Array, scale: Array, tokens: Array, dtype) -> Array:
    """Rows [..., D] of int8 `embedding` [V, D] times their `scale` [V], in `dtype`."""
    rows = lookup(embedding, tokens).astype(jnp.float32) * lookup(scale[:, None], tokens)
    return rows.astype(dtype)


def lookup(embedding: Array, tokens: Array) -> Array:
    """`embedding[tokens]`: rows [..., D] of `embedding` [V, D]."""
    if embedding.shape[0] <= ONE_HOT_VOCABULARY:
        # For a small vocabulary a product with one-hot rows beats gather, and its transpose,
        # the embedding's gradient, beats scatter-add by far. HIGHEST keeps it exact on TPU.
        one_hot = jax.nn.one_hot(tokens, embedding.shape[0], dtype=embedding.dtype)
        return jnp.dot(one_hot, embedding, precision=lax.Precision.HIGHEST)
    return embedding[tokens] if embedding.dtype == jnp.float32 else _narrow_lookup(embedding, tokens)


# JAX's own transpose adds up the gradients of a token in bfloat16, one occurrence after the other:
# of a token that occurs hundreds of times, most get lost.
@jax.custom_vjp
def _narrow_lookup(embedding: Array, tokens: Array) -> Array:
    return embedding[tokens]


def _lookup_forward(embedding: Array, tokens: Array):
    # An empty slice carries the shape and dtype without keeping the embedding.
    return embedding[tokens], (tokens, embedding[:, :0])


def _lookup_backward(residuals, cotangent):
    tokens, like = residuals
    total = jnp.zeros((like.shape[0], cotangent.shape[-1]), jnp.float32)
    total = total.at[tokens].add(cotangent.astype(jnp.float32))
    return total.astype(like.dtype), None


_narrow_lookup.defvjp(_lookup_forward, _lookup_backward)


class Linear(nnx.Module):
    """`x @ kernel + bias`; kernel [in, out]."""

    adapter = None  # `add_lora` gives some instances one; the others stay as they are
    kernel_scale = None  # [out] float32 where the kernel is int8, see `_int8`

    def __init__(self, axes: tuple[str, str], shape: tuple[int, int], bias: bool, *, rngs, dtype):
        init = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(init.astype(dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(shape[1:], dtype), axes=axes[1:]) if bias else None

    def __call__(self, x: Array) -> Array:
        out = self.project(x)
        if self.adapter is not None:  # in float32: rounded to bfloat16 first, small updates would get lost
            out = out + self.adapter(x)
        out = out.astype(x.dtype)
        return out if self.bias is None else out + self.bias[...]

    def project(self, x: Array) -> Array:
        """`x @ kernel`: [..., out] float32."""
        return project(x, self.kernel[...], scale=value(self.kernel_scale))


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + epsilon) * scale`, the quotient in float32.

    References:
        Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """

    def __init__(self, width: int, epsilon: float, axes: tuple[str, ...] = ("norm",), *, dtype):
        self.scale = nnx.Param(jnp.ones(width, dtype), axes=axes)
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(x.dtype) * self.scale[...]


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config, *, rngs, dtype):
        inner, outer = config.ff_width, config.width
        into = (("embed", "mlp"), (outer, inner), config.mlp_bias)
        self.gate = Linear(*into, rngs=rngs, dtype=dtype)
        self.up = Linear(*into, rngs=rngs, dtype=dtype)
        self.down = Linear(("mlp", "embed"), (inner, outer), config.mlp_bias, rngs=rngs, dtype=dtype)

    def __call__(self, x: Array) -> Array:
        gate, up = (linear(x).astype(jnp.float32) for linear in (self.gate, self.up))
        return self.down((nnx.silu(gate) * up).astype(x.dtype))
