"""What the name of a matrix says: its layer, its module, its kind; and the step in a checkpoint's name."""

import re
from pathlib import PurePath
from typing import NamedTuple

from opd_jax.transforms._matrices import kind_of

MODULES = ("q", "k", "v", "o", "gate", "up", "down", "embedding", "head", "other")
KINDS = ("attention", "mlp", "embedding", "other")
_KIND_OF = dict(q="attention", k="attention", v="attention", o="attention", gate="mlp", up="mlp", down="mlp")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|blk)[._](\d+)(?:\.|$)")
_MODULE = (
    (r"(?:^|\.)(?:lm_head|head|output|unembed)(?:\.|$)", "head"),
    (r"embed|(?:^|\.)wte(?:\.|$)", "embedding"),
    (r"(?:^|\.)(q|k|v|o)(?:_proj)?(?:\.|$)", None),
    (r"(?:^|\.)(gate|up|down)(?:_proj)?(?:\.|$)", None),
)
_STEP = re.compile(r"(?:^|[-_.])(?:checkpoint|ckpt|step|steps|iter|iteration)[-_=]?(\d+)(?:$|[-_.])", re.I)


class Place(NamedTuple):
    """Where a matrix stands in a model.

    Attributes:
        layer: from 0; None outside of the layers.
        module: one of `MODULES`.
        kind: one of `KINDS`.
    """

    layer: int | None
    module: str
    kind: str


def place_of(name: str) -> Place:
    """What the name of a tensor says.

    Example:
        >>> place_of("model.layers.3.self_attn.q_proj.weight")
        Place(layer=3, module='q', kind='attention')
        >>> place_of("lm_head.weight")
        Place(layer=None, module='head', kind='embedding')
    """
    layer = _LAYER.search(name)
    number = int(layer[1]) if layer else None
    for pattern, module in _MODULE:
        if found := re.search(pattern, name):
            if module and layer:  # "output" or "embed" inside a layer is something else
                continue
            module = module or found[1]
            return Place(number, module, _KIND_OF.get(module, "embedding"))
    return Place(number, "other", kind_of(name))


def sort_key(name: str) -> tuple:
    """The order of a model: the embedding, layer by layer, the rest, the head; numbers by their size."""
    place = place_of(name)
    part = {"embedding": 0, "head": 3}.get(place.module, 2) if place.layer is None else 1
    numbers = tuple(int(word) if word.isdecimal() else -1 for word in re.split(r"(\d+)", name))
    return part, place.layer or 0, MODULES.index(place.module), numbers, name


def step_of(path: str) -> int | None:
    """The training step that a checkpoint's path tells, from its last part that tells one.

    Example:
        >>> step_of("runs/a/checkpoint-500"), step_of("out/global_step_20/actor"), step_of("runs/7")
        (500, 20, 7)
        >>> print(step_of("Qwen/Qwen3-8B"))
        None
    """
    for part in reversed(PurePath(path).parts):
        if part.isdecimal():
            return int(part)
        if found := _STEP.search(part):
            return int(found[1])
    return None
