"""What the collectives of a compiled program carry, loops as often as they run."""

import math
import re
from typing import NamedTuple

from opd_jax.parallel._cost import COLLECTIVES, _Counter, _sent
from opd_jax.parallel._hlo_text import parse


class Sent(NamedTuple):
    kind: str
    dims: tuple[int, ...]  # of the result
    width: int  # bytes of an element
    times: float
    bytes: float  # that leave a device, all times together


def collectives(text: str, loops: int = 1) -> list[Sent]:
    """One entry for each result of each collective of the text of `compiled.as_text()`."""
    entry, computations = parse(text)
    counter = _Counter(computations, lambda *_: None, loops)
    found: list[Sent] = []

    def walk(name: str, times: float, seen: set) -> None:
        own = computations[name]
        for one in own.instructions.values():
            kind = one.op.removesuffix("-start")
            if one.op == "while":
                walk(one.called("body"), times * counter._trips(own, one), set())
            elif one.op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
                for branch in re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []:
                    walk(branch, times, set())
            elif kind in COLLECTIVES:
                add(own, one, kind, times, seen)
            elif (inner := one.called("calls") or one.called("to_apply")) in computations:
                walk(inner, times, seen)

    def add(own, one, kind: str, times: float, seen: set) -> None:
        channel = re.search(r"channel_id=(\d+)", one.rest)
        key = (kind, channel[1] if channel else one.name)
        if key in seen:  # an asynchronous one stands in its start, in its steps and in its end
            return
        seen.add(key)
        operands = own.operand_shapes(one)
        results = one.result[-len(operands) :] if one.op == kind else one.result[len(operands) :]
        for operand, result in zip(operands, results, strict=False):
            name, size = _sent(kind, operand.bytes, one.group, own.name)
            width = result.bytes // max(1, math.prod(result.dims))
            found.append(Sent(name, result.dims, width, times, times * size))

    walk(entry, 1, set())
    return found
