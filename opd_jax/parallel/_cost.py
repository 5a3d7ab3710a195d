"""What one run of a compiled program costs a device, counted in its text, loops as often as they run.

`compiled.cost_analysis()` counts the body of a loop once, and a model is loops: over layers,
micro-batches, chunks.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from opd_jax.parallel._hlo_text import Computation, Instruction, Shape, parse

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota",
    "replica-id", "opt-barrier", "domain",
}  # fmt: skip
_PARTS = {"dynamic-slice", "slice", "gather"}
_THROUGH = {"bitcast", "reshape", "convert", "copy", "transpose"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
Kernels = Callable[[str, list[Shape]], float | None]
"""FLOPs of a custom call by its name and its operands; None: not known."""


@dataclass
class Cost:
    """Per device.

    Attributes:
        flops: of matrix products and convolutions, 2 for each multiplication and addition.
        bytes: read from and written to the main memory by instructions, each fusion's operands and results
            once; what stays in the chip's fast memory does not count.
        collectives: kind -> [how often, bytes that leave the device], by the ring algorithms.
        unknown: kernels whose FLOPs are not known, and not counted.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, list[float]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)

    @property
    def sent(self) -> float:
        """Bytes that leave the device, over all kinds."""
        return sum(size for _, size in self.collectives.values())

    def add(self, other: "Cost", times: float = 1) -> None:
        """Adds `times` the other."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for kind, (count, size) in other.collectives.items():
            mine = self.collectives.setdefault(kind, [0.0, 0.0])
            mine[0] += times * count
            mine[1] += times * size
        self.unknown |= other.unknown


def cost(text: str, *, kernels: Kernels | None = None, loops: int = 1) -> Cost:
    """Counts a program.

    Args:
        text: of `compiled.as_text()`.
        kernels: knows custom kernels.
        loops: how often a loop runs whose count is not in the text (of a decoding loop: tokens).
    """
    entry, computations = parse(text)
    return _Counter(computations, kernels or (lambda *_: None), loops).computation(entry)


class _Counter:
    def __init__(self, computations: dict[str, Computation], kernels: Kernels, loops: int):
        self._all, self._kernels, self._loops = computations, kernels, loops
        self._known: dict[str, Cost] = {}

    def computation(self, name: str) -> Cost:
        if name not in self._known:
            total, seen, own = Cost(), set(), self._all[name]
            for instruction in own.instructions.values():
                total.add(self._instruction(own, instruction, seen))
            self._known[name] = total
        return self._known[name]

    def _instruction(self, own: Computation, one: Instruction, seen: set) -> Cost:
        if one.op in _FREE or one.op.endswith("-done"):
            return Cost()
        if one.op == "while":
            total, times = Cost(), self._trips(own, one)
            for part in ("condition", "body"):
                total.add(self.computation(one.called(part)), times)
            return total
        if one.op == "conditional":
            names = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
            names = re.findall(r"%?([\w.\-]+)", names[1]) if names else []
            names += [one.called(k) for k in ("true_computation", "false_computation") if one.called(k)]
            return max(map(self.computation, names), key=lambda c: c.flops + c.bytes, default=Cost())
        inner = one.called("calls") or one.called("to_apply")
        if one.op in ("call", "async-start") and inner in self._all:
            return self.computation(inner)
        total = Cost()
        self._products(own, one, total, seen)
        total.bytes = self._traffic(own, one)
        return total

    def _products(self, own: Computation, one: Instruction, total: Cost, seen: set) -> None:
        """FLOPs and collectives of an instruction and of what is fused into it."""
        kind = one.op.removesuffix("-start")
        if one.op == "fusion":
            inner = self._all[one.called("calls")]
            for each in inner.instructions.values():
                self._products(inner, each, total, seen)
        elif one.op in ("dot", "convolution"):
            total.flops += _dot(own, one) if one.op == "dot" else _convolution(own, one)
        elif kind in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", one.rest)
            key = (kind, channel[1] if channel else one.name)
            if key not in seen:  # an asynchronous one stands in its start, in its steps and in its end
                seen.add(key)
                sent = sum(shape.bytes for shape in own.operand_shapes(one))
                kind, size = _sent(kind, sent, one.group, own.name)
                total.add(Cost(collectives={kind: [1.0, size]}))
        elif one.op == "custom-call" and _is_kernel(one):
            flops = self._kernels(one.name, own.operand_shapes(one))
            if flops is None:
                total.unknown.add(re.sub(r"\.\d+$", "", one.name))
            total.flops += flops or 0.0

    def _trips(self, own: Computation, one: Instruction) -> float:
        """How often a loop runs: what XLA says, or (limit - start) / step of its counter, or `loops`."""
        if found := re.search(r'known_trip_count":?\{"n":"(\d+)"', one.rest):
            return int(found[1])
        condition, body = self._all[one.called("condition")], self._all[one.called("body")]
        test = condition.root
        if test is None or test.op != "compare" or "direction=LT" not in test.rest:
            return self._loops
        limit, counter = _number(condition, test.operands[1]), condition.instructions.get(test.operands[0])
        place = re.search(r"index=(\d+)", counter.rest) if counter is not None else None
        if limit is None or place is None:
            return self._loops
        step = start = None
        if body.root is not None and body.root.op == "tuple":
            grown = body.instructions.get(body.root.operands[int(place[1])])
            if grown is not None and grown.op == "add":  # XLA unrolls some loops: the step is not always 1
                step = next((n for name in grown.operands if (n := _number(body, name)) is not None), None)
        given = own.instructions.get(one.operands[0])
        if given is not None and given.op == "tuple":
            start = _number(own, given.operands[int(place[1])])
        return -(-(limit - (start or 0)) // (step or 1))

    def _traffic(self, own: Computation, one: Instruction) -> float:
        if one.op in ("copy-start", "slice-start"):
            moved = one.result[0] if one.op == "copy-start" else one.result[-2]
            source = own.operand_shapes(one)
            reads = moved.bytes if any(shape.main for shape in source) else 0
            return reads + (moved.bytes if moved.main else 0)
        if one.op in _PARTS:
            return _main(one.result) + _main(one.result)
        if one.op == "dynamic-update-slice":
            return 2 * _main(own.operand_shapes(one)[1:2])
        if one.op != "fusion":
            results = one.result[1:2] if one.op.endswith("-start") else one.result
            return _main(own.operand_shapes(one)) + _main(results)
        inner = self._all[one.called("calls")]
        parameters, total = inner.parameters, 0.0
        for number, name in enumerate(one.operands):
            operand = own.instructions.get(name)
            if operand is not None and number in parameters and _main(operand.result):
                total += min(self._read(inner, parameters[number]), _main(operand.result))
        return total + self._written(inner, one)

    def _read(self, own: Computation, parameter: Instruction) -> float:
        """Bytes of a fusion's parameter that are looked at."""
        total = 0.0
        for user in own.users.get(parameter.name, ()):
            if user.op in _PARTS and user.operands[0] == parameter.name:
                total += sum(shape.bytes for shape in user.result)
            elif user.op == "dynamic-update-slice" and user.operands[0] == parameter.name:
                continue  # in place
            elif user.op == "bitcast":
                total += self._read(own, user)
            elif user.op == "fusion":
                inner = self._all[user.called("calls")]
                for number, name in enumerate(user.operands):
                    if name == parameter.name and number in inner.parameters:
                        total += self._read(inner, inner.parameters[number])
            else:
                total += sum(shape.bytes for shape in parameter.result)
        return total

    def _written(self, inner: Computation, one: Instruction) -> float:
        root = inner.root
        parts = [inner.instructions.get(name) for name in root.operands] if root.op == "tuple" else [root]
        if len(parts) != len(one.result):
            return _main(one.result)
        return sum(self._update(inner, part, shape) for part, shape in zip(parts, one.result, strict=True))

    def _update(self, own: Computation, part: Instruction | None, shape: Shape) -> float:
        """Bytes written of a result: of one that is updated in place, the update."""
        if not shape.main:
            return 0.0
        while part is not None and part.op in _THROUGH:
            part = own.instructions.get(part.operands[0])
        if part is not None and part.op == "dynamic-update-slice":
            return sum(each.bytes for each in own.instructions[part.operands[1]].result)
        if part is not None and part.op == "fusion":
            inner = self._all[part.called("calls")]
            if inner.root.op != "tuple":
                return self._update(inner, inner.root, shape)
        return shape.bytes


def _number(own: Computation, name: str) -> int | None:
    """The value of an integer constant."""
    found = own.instructions.get(name)
    while found is not None and found.op in ("copy", "bitcast"):
        found = own.instructions.get(found.operands[0])
    if found is None or found.op != "constant" or not found.operands[0].isdigit():
        return None
    return int(found.operands[0])


def _main(found: list[Shape]) -> float:
    return sum(shape.bytes for shape in found if shape.main)


def _is_kernel(one: Instruction) -> bool:
    return bool(re.search(r'custom_call_target="(tpu_custom_call|__gpu\$|triton|__cudnn|__onednn)', one.rest))


def _sent(kind: str, size: float, group: int, where: str) -> tuple[str, float]:
    """Kind, and bytes that leave a device, of a collective whose operands have `size` bytes there."""
    if kind == "collective-permute" or not group:
        return kind, size
    share = (group - 1) / group
    if kind == "all-reduce" and where.startswith("all-reduce-scatter"):  # how XLA:TPU fuses one
        return "reduce-scatter", size * share
    factor = {"all-gather": group - 1, "all-reduce": 2 * share}.get(kind, share)
    return kind, size * factor


def _dims(text: str, key: str) -> list[int]:
    found = re.search(rf"{key}=\{{([\d,]*)\}}", text)
    return [int(i) for i in found[1].split(",") if i] if found else []


def _dot(own: Computation, one: Instruction) -> float:
    left = own.operand_shapes(one)[0].dims
    contracted = math.prod(left[i] for i in _dims(one.rest, "lhs_contracting_dims"))
    return 2.0 * math.prod(one.result[0].dims) * contracted


def _convolution(own: Computation, one: Instruction) -> float:
    """XLA:TPU writes matrix products as convolutions, a batch of them with a dilated window."""
    left, right = (shape.dims for shape in own.operand_shapes(one)[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    if labels is None:
        return 0.0
    lhs, rhs, out = labels[1], labels[2], labels[3]
    result = one.result[0].dims
    products = math.prod(result[out.index(c)] for c in "bf") * right[rhs.index("i")]
    for i, digit in enumerate(sorted(c for c in lhs if c.isdigit())):
        sizes = left[lhs.index(digit)], right[rhs.index(digit)], result[out.index(digit)]
        products *= _window(one.rest, i, *sizes)
    return 2.0 * products


def _window(text: str, i: int, size: int, kernel: int, out: int) -> int:
    """How many pairs of a kernel's and an output's place in one dimension meet an element."""
    found = re.search(r"window=\{([^}]*)\}", text)
    given = dict(part.split("=") for part in found[1].split()) if found else {}

    def value(key: str, default: int) -> int:
        return int(given[key].split("x")[i].split("_")[0]) if key in given else default

    stride, low = value("stride", 1), value("pad", 0)
    spread, base = value("rhs_dilate", 1), value("lhs_dilate", 1)
    if kernel == 1 and low == 0 and stride == 1:
        return sum(o % base == 0 and o // base < size for o in range(out)) if base > 1 else min(out, size)
    last = (size - 1) * base
    return sum(
        0 <= (place := o * stride + k * spread - low) <= last and place % base == 0
        for k in range(kernel)
        for o in range(out)
    )
