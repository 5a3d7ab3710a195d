"""Two trees of weights, a tensor at a time: matched by name, stacks taken apart, and put together again."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opd_jax.analysis._names import MODULES, place_of
from opd_jax.models import Decoder, merge_lora
from opd_jax.models._names import _NAMES
from opd_jax.transforms._matrices import _VECTORS, path_name

BLOCKS = ("attention", "mlp")
Change = Callable[[str, np.ndarray, np.ndarray], np.ndarray]
"""`change(name, before, after)` -> what takes the place of a part."""


class Pair(NamedTuple):
    """One tensor, or one layer of a stack, in two trees."""

    name: str
    before: np.ndarray
    after: np.ndarray


def edited(base: Any, tuned: Any, change: Change, who: str) -> Any:
    """A tree like `tuned` with each part as `change(name, before, after)` gives it."""
    leaves, treedef, before = _together(base, tuned, who)
    out = []
    for name, leaf in leaves.items():
        new, other = np.asarray(leaf), np.asarray(before[name])
        if jnp.issubdtype(new.dtype, jnp.inexact):
            new = np.empty(new.shape, jnp.promote_types(new.dtype, other.dtype))
            for pair, out_part in zip(_split(name, other, np.asarray(leaf)), _views(name, new), strict=True):
                out_part[...] = change(*pair)
        out.append(new)
    return jax.tree.unflatten(treedef, out)


def pairs(base: Any, other: Any, who: str) -> Iterable[Pair]:
    """All tensors of two trees; ValueError, beginning with `who`, if their names or shapes differ."""
    leaves, _, before = _together(base, other, who)
    for name, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            yield from _split(name, np.asarray(before[name]), np.asarray(leaf))


def distance(base: Any, edited: Any) -> float:
    """||W - W_base||_F over all tensors, float64."""
    return math.hypot(*(norm(update_of(p.before, p.after)) for p in pairs(base, edited, "distance")))


def depth(tree: Any) -> int:
    """The number of layers that the names of a tree's tensors tell; ValueError if they tell none."""
    found = {place_of(name).layer for name in _names(tree)} - {None}
    if not found:
        raise ValueError("no tensor's name tells a layer, as model.layers.3.mlp.up_proj.weight does")
    return max(found) + 1


def groups(tree: Any) -> tuple[str, ...]:
    """The modules of a tree that `leave_out` takes."""
    found = set().union(*(labels(name) for name in _names(tree)))
    return tuple(label for label in (*MODULES[:-1], *BLOCKS, MODULES[-1]) if label in found)


def as_tree(source: Any) -> Any:
    """A `Decoder` as its parameters, with adapters merged; any other tree as it is."""
    return nnx.state(merge_lora(source), nnx.Param) if isinstance(source, Decoder) else source


def labels(name: str) -> set[str]:
    """The module of a tensor, and "attention" or "mlp" if it is of those; norms are "other"."""
    place = place_of(name)
    vector = place.module == "other" and re.search(_VECTORS, name.lower())
    return {place.module} | (set() if vector else {place.kind} & set(BLOCKS))


def is_matrix(name: str, part: np.ndarray) -> bool:
    """Whether a part is what `open_checkpoint` calls a matrix."""
    return part.ndim == 2 and min(part.shape) > 1 and not re.search(_VECTORS, name.lower())


def wide(x: np.ndarray) -> np.ndarray:
    """In float32, or float64 if it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32), copy=False)


def update_of(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """after - before, in float32."""
    return wide(after) - wide(before)


def norm(x: np.ndarray) -> float:
    """Frobenius', in float64."""
    return float(np.linalg.norm(x.astype(np.float64)))


def _together(base: Any, tuned: Any, who: str) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """(leaves of `tuned`, how they make a tree, leaves of `base`), by name."""
    before, _ = _leaves(base)
    leaves, treedef = _leaves(tuned)
    if before.keys() != leaves.keys():
        name = min(before.keys() ^ leaves.keys())
        where = "base" if name in before else "tuned model"
        raise ValueError(f"{who}: only the {where} has {name}; are the two of one architecture?")
    for name, leaf in leaves.items():
        if before[name].shape != leaf.shape:
            shapes = f"{list(before[name].shape)} in the base, {list(leaf.shape)} in the tuned model"
            raise ValueError(f"{who}: {name} is {shapes}; are the two of one architecture?")
    return leaves, treedef, before


def _leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    flat, treedef = jax.tree_util.tree_flatten_with_path(as_tree(tree))
    leaves = {path_name(path).replace("/", "."): leaf for path, leaf in flat}
    if adapters := [name for name in leaves if re.search(r"(^|[._])lora_[abAB]([._]|$)", name)]:
        raise ValueError(f"{adapters[0]} is of a LoRA adapter; merge it first, by opd_jax.models.merge_lora")
    return leaves, treedef


def _names(tree: Any) -> list[str]:
    return [name for key, leaf in _leaves(tree)[0].items() for name in _part_names(key, leaf)]


def _part_names(name: str, leaf: Any) -> list[str]:
    """Names of a leaf's parts: Hugging Face's of our own parameters, `name[i]` of other stacks."""
    known = _NAMES.get(name, (None,))[0]
    if known and name.startswith("layers."):
        return [f"model.layers.{i}.{known}" for i in range(leaf.shape[0])]
    if known or leaf.ndim < 3:
        return [known or name]
    return [f"{name}[{i}]" for i in range(math.prod(leaf.shape[:-2]))]


def _views(name: str, array: np.ndarray) -> Iterable[np.ndarray]:
    """The parts of a leaf, in the order of `_part_names`."""
    if name in _NAMES and name.startswith("layers."):
        return (array[i, ...] for i in range(len(array)))  # views even of one number
    if name in _NAMES or array.ndim < 3:
        return (array,)
    return iter(array.reshape(-1, *array.shape[-2:]))


def _split(name: str, before: np.ndarray, after: np.ndarray) -> Iterable[Pair]:
    parts = _part_names(name, after), _views(name, before), _views(name, after)
    return (Pair(*each) for each in zip(*parts, strict=True))
