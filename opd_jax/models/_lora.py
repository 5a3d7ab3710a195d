"""Low-rank adapters on the linear maps of a decoder's layers."""

import functools
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from opd_jax.models._decoder import Decoder
from opd_jax.models._int8 import is_int8
from opd_jax.models._layers import Linear, matmul, project
from opd_jax.models._names import Path, parameters

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
_REFUSED = {
    "embedding": "its rows are looked up, not multiplied, and a tied head would change with them",
    "head": "the losses take its matrix as a whole, [D, V], to hold the logits of a few tokens at a time",
}
_DTYPES = (jnp.float32, jnp.bfloat16)


class LoRAParam(nnx.Param):
    """A matrix of a low-rank adapter; `nnx.split(model, LoRAParam, ...)` parts them from the base."""


class LoRA(nnx.Module):
    """`alpha / rank * x A B`, in the wider of the dtypes of `x` and of the matrices.

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """

    def __init__(self, a: Array, b: Array, axes: tuple[str, str], alpha: float):
        # Not called a and b: where names tell, a leaf named b is a bias.
        self.lora_a = LoRAParam(a, axes=(axes[0], None))
        self.lora_b = LoRAParam(b, axes=(None, axes[1]))
        self.alpha = alpha

    @property
    def rank(self) -> int:
        return self.lora_a.shape[-1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def __call__(self, x: Array) -> Array:
        """[..., out] float32 of x [..., in]."""
        dtype = jnp.promote_types(x.dtype, self.lora_a.dtype)
        a, b = self.lora_a[...].astype(dtype), self.lora_b[...].astype(dtype)
        return self.scale * project(matmul(x.astype(dtype), a), b)


class Target(NamedTuple):
    """A stack of linear maps that may have adapters."""

    path: Path  # ("layers", "attention", "q")
    hf_names: tuple[str, ...]  # one a layer: "model.layers.0.self_attn.q_proj"
    shape: tuple[int, int, int]  # [L, in, out]

    @property
    def names(self) -> tuple[str, ...]:
        """("q", "attention.q", "layers.attention.q")."""
        return tuple(".".join(self.path[i:]) for i in range(len(self.path) - 1, -1, -1))


def add_lora(
    model: Decoder,
    *,
    rank: int,
    alpha: float,
    targets: Iterable[str] | str = LINEAR,
    key: Array,
    dtype=jnp.float32,
) -> Decoder:
    """A copy of `model` with low-rank adapters, which at first change nothing.

    y = x W + alpha / rank * x A B, with W [in, out] frozen, A [in, rank] uniform in +-1 / sqrt(in), as in
    PEFT, and B [rank, out] zero; both stacked over the layers. The base's arrays are shared, not copied.

    Args:
        model: any `Decoder`, its parameters anywhere; the adapters are laid out as they are.
        rank: of A B, at least 1 and at most the smallest width of a module.
        alpha: scales the adapters; above 0.
        targets: names of modules, such as "q" or "mlp.gate"; or one regular expression that has to match
            such a name as a whole.
        key: random numbers for A. A module's A does not depend on which others are targets.
        dtype: of the adapters, float32 or bfloat16.

    Returns:
        The model whose `LoRAParam`s are to be trained: `nnx.split(model, LoRAParam, ...)`.

    Raises:
        ValueError: if a target names no module, or one that cannot have an adapter; if the rank is larger
            than a module's matrix allows; if the model has adapters already.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from opd_jax import models
        >>> config = models.DecoderConfig(
        ...     vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, head_width=4, ff_width=32)
        >>> model = models.Decoder(config, rngs=nnx.Rngs(0))
        >>> adapted = models.add_lora(model, rank=4, alpha=8, targets=("q", "v"), key=jax.random.key(0))
        >>> graphdef, trained, frozen = nnx.split(adapted, models.LoRAParam, ...)
        >>> trained.layers.attention.q.adapter.lora_b.shape
        (2, 4, 16)

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """
    check_plain(model)
    if jnp.dtype(dtype) not in map(jnp.dtype, _DTYPES):
        raise ValueError(f"dtype is {jnp.dtype(dtype).name}; it must be float32 or bfloat16")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha}; it must be above 0")
    known = modules(model)
    chosen = _choose(known, targets)
    check_rank(rank, chosen)
    places = [known.index(target) for target in chosen]

    def make(key: Array) -> list[tuple[Array, Array]]:
        keys = [jax.random.fold_in(key, place) for place in places]
        return [_initial(*pair, rank, dtype) for pair in zip(keys, chosen, strict=True)]

    kernels = [find(model, target.path).kernel.get_value() for target in chosen]
    if isinstance(kernels[0], jax.ShapeDtypeStruct):
        pairs = jax.eval_shape(make, key)
    else:
        pairs = jax.jit(make, out_shardings=[layout(kernel) for kernel in kernels])(key)
    return attach(model, {t.path: pair for t, pair in zip(chosen, pairs, strict=True)}, float(alpha))


def merge_lora(model: Decoder) -> Decoder:
    """The plain decoder that computes what `model` does: W + alpha / rank * A B in place of W.

    The sum is taken in float32 and rounded to the dtype of W. In bfloat16 that loses updates smaller than
    1/256 of the weight they go to, which the unmerged model adds to the activations instead.

    Args:
        model: from `add_lora` or `load_lora`; one without adapters is returned as it is.

    Returns:
        A decoder of the structure, shapes, dtypes and shardings that it had before `add_lora`; the
        arrays that have no adapter are shared.
    """
    found = adapted(model)
    if not found:
        return model
    model = nnx.clone(model)  # new variables, the same arrays
    linears = [find(model, target.path) for target in found]
    operands = [
        tuple(leaf.get_value() for leaf in (each.kernel, each.adapter.lora_a, each.adapter.lora_b))
        for each in linears
    ]
    static = tuple(
        (each.adapter.scale, _named(kernel)) for each, (kernel, *_) in zip(linears, operands, strict=True)
    )
    for linear, kernel in zip(linears, _merged(operands, static), strict=True):
        linear.kernel.set_value(kernel)
        del linear.adapter
    return model


def modules(model: Decoder) -> list[Target]:
    """All that may have adapters, in a fixed order."""
    base = nnx.state(model, nnx.All(nnx.Param, nnx.Not(LoRAParam)))
    return [
        Target(p.path[:-1], tuple(name.removesuffix(".weight") for name in p.hf_names), p.shape)
        for p in parameters(model.config, base)
        if p.path[0] == "layers" and p.path[-1] == "kernel"
    ]


def adapted(model: Decoder) -> list[Target]:
    """Those of `modules` that have adapters."""
    return [target for target in modules(model) if find(model, target.path).adapter is not None]


def find(model: Decoder, path: Path) -> Linear:
    """The module at `path`."""
    return functools.reduce(getattr, path, model)


def attach(model: Decoder, pairs: dict[Path, tuple[Array, Array]], alpha: float) -> Decoder:
    """A copy of `model` with the adapters A [L, in, rank], B [L, rank, out] at the paths."""
    model = nnx.clone(model)  # new variables, the same arrays
    for path, (a, b) in pairs.items():
        linear = find(model, path)
        linear.adapter = LoRA(a, b, linear.kernel.get_metadata()["axes"], alpha)
    return model


def layout(kernel: Array) -> tuple[Sharding | None, Sharding | None]:
    """Shardings of A and B that go with the kernel's: the rank is never split. None: anywhere."""
    sharding = None if isinstance(kernel, jax.core.Tracer) else kernel.sharding
    if isinstance(sharding, NamedSharding):
        layers, into, out = (*sharding.spec, None, None, None)[:3]
        specs = P(layers, into, None), P(layers, None, out)
        return tuple(NamedSharding(sharding.mesh, spec) for spec in specs)
    alone = sharding is not None and len(sharding.device_set) == 1
    return (sharding, sharding) if alone else (None, None)


def check_plain(model: Decoder) -> None:
    """Raises ValueError if the model has adapters, or int8 weights."""
    if is_int8(model):
        raise ValueError("the model's weights are int8: it cannot be trained; load it in bfloat16 or float32")
    if adapted(model):
        raise ValueError("the model has adapters already; merge them first, by merge_lora")


def check_rank(rank: Any, targets: list[Target]) -> None:
    """Raises ValueError unless `rank` is one that adapters of these modules can have."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank is {rank!r}; it must be a positive integer")
    for target in targets:
        if rank > min(target.shape[1:]):
            into, out = target.shape[1:]
            raise ValueError(
                f"rank is {rank}, but {target.names[1]} is a matrix of [{into}, {out}]: it can be at most "
                f"{min(into, out)}"
            )


def _choose(known: list[Target], targets: Iterable[str] | str) -> list[Target]:
    """Those of `known` that the targets name."""
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets is {targets!r}, which is no regular expression: {error}") from error
        found = [t for t in known if any(pattern.fullmatch(name) for name in t.names)]
        if not found:
            raise ValueError(_unknown(targets, [n for n in _REFUSED if pattern.fullmatch(n)], known))
        return found
    targets = list(targets)
    if not targets:
        raise ValueError(f"targets is empty; name modules: {_listed(known)}")
    for name in targets:
        if not any(name in t.names for t in known):
            raise ValueError(_unknown(name, [n for n in _REFUSED if n == name], known))
    return [t for t in known if any(name in t.names for name in targets)]


def _unknown(target: str, refused: list[str], known: list[Target]) -> str:
    if refused:
        return (
            f"the {refused[0]} cannot have an adapter: {_REFUSED[refused[0]]}; choose from {_listed(known)}"
        )
    return f"target {target!r} matches no module; there are {_listed(known)}"


def _listed(known: list[Target]) -> str:
    return ", ".join(target.names[1] for target in known)


def _initial(key: Array, target: Target, rank: int, dtype) -> tuple[Array, Array]:
    layers, into, out = target.shape
    bound = 1 / math.sqrt(into)  # kaiming_uniform_(a=sqrt(5))
    a = jax.random.uniform(key, (layers, into, rank), jnp.float32, -bound, bound)
    return a.astype(dtype), jnp.zeros((layers, rank, out), dtype)


def _named(kernel: Array) -> NamedSharding | None:
    sharding = None if isinstance(kernel, jax.core.Tracer) else kernel.sharding
    return sharding if isinstance(sharding, NamedSharding) else None


@functools.partial(jax.jit, static_argnums=1)
def _merged(operands: list[tuple[Array, Array, Array]], static: tuple) -> list[Array]:
    def merge(scale, kernel, a, b):
        update = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)

    merged = []
    for (scale, sharding), arrays in zip(static, operands, strict=True):
        # A layer at a time: the float32 sum of all would be twice as large as a bfloat16 model.
        kernel = lax.map(lambda layer, scale=scale: merge(scale, *layer), arrays)
        merged.append(kernel if sharding is None else lax.with_sharding_constraint(kernel, sharding))
    return merged
