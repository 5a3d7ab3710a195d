"""Reading the text of a compiled program: computations, instructions, shapes."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\{\s*$")
_NAME = re.compile(r"^\s*(ROOT\s+)?%?([\w.\-]+) = ")
_BITS = re.compile(r"\d+")
_SPACE = re.compile(r"S\((\d+)\)")


class Shape(NamedTuple):
    """An array: its sizes, its bytes without padding, and whether it lies in the main memory."""

    dims: tuple[int, ...]
    bytes: int
    main: bool


def shapes(text: str) -> list[Shape]:
    """All arrays of a type, tuples flattened.

    Example:
        >>> shapes("(bf16[2,3]{1,0:T(8,128)S(1)}, u32[])")
        [Shape(dims=(2, 3), bytes=12, main=False), Shape(dims=(), bytes=4, main=True)]
    """
    found = []
    for kind, sizes, layout in _SHAPE.findall(text):
        dims = tuple(int(size) for size in sizes.split(",") if size)
        bits = 8 if kind == "pred" else int((_BITS.search(kind) or [0])[0])
        space = _SPACE.search(layout)
        found.append(Shape(dims, math.ceil(math.prod(dims) * bits / 8), space is None or space[1] == "0"))
    return found


@dataclass(frozen=True)
class Instruction:
    """One line: its name, result, operation, the names of its operands, and what else it says."""

    name: str
    root: bool
    result: list[Shape]
    op: str
    operands: tuple[str, ...]
    rest: str

    def called(self, key: str) -> str | None:
        """The computation that an attribute such as `calls` or `body` names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def group(self) -> int:
        """How many devices take part in a collective; 0: the text does not say."""
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]", self.rest):
            return int(found[1])
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", self.rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
        found = re.search(r"replica_groups=\{\{([\d,]+)\}", self.rest)
        return len(found[1].split(",")) if found else 0


@dataclass
class Computation:
    """Instructions by name, in order, and who uses them."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    users: dict[str, list[Instruction]] = field(default_factory=dict)

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """Of all operands, tuples flattened."""
        known = (self.instructions.get(name) for name in instruction.operands)
        return [shape for each in known if each is not None for shape in each.result]

    @property
    def root(self) -> Instruction | None:
        return next((i for i in self.instructions.values() if i.root), None)

    @property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {int(i.operands[0]): i for i in self.instructions.values() if i.op == "parameter"}


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """The entry's name and all computations of `compiled.as_text()`.

    Raises:
        ValueError: if there is no entry.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if found := _HEAD.match(line):
                current = computations[found[2]] = Computation(found[2])
                entry = found[2] if found[1] else entry
        elif line.rstrip() == "}":  # a kernel's metadata may have lines that begin with one
            current = None
        elif (instruction := _instruction(line)) is not None:
            current.instructions[instruction.name] = instruction
            for name in instruction.operands:
                current.users.setdefault(name, []).append(instruction)
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is not that of a compiled program")
    return entry, computations


def _instruction(line: str) -> Instruction | None:
    found = _NAME.match(line)
    if found is None:
        return None
    text = line[found.end() :]
    end = _closing(text, 0) if text.startswith("(") else text.find(" ")
    result, text = text[:end], text[end:].lstrip()
    start = text.find("(")
    stop = _closing(text, start)
    operands = tuple(_operands(text[start + 1 : stop - 1]))
    return Instruction(found[2], bool(found[1]), shapes(result), text[:start], operands, text[stop:])


def _operands(text: str) -> Iterator[str]:
    text = re.sub(r"/\*.*?\*/", "", text)
    if "%" in text:
        yield from re.findall(r"%([\w.\-]+)", text)
    else:  # a parameter's number, a constant, or names without a sign
        yield from (part.split()[-1] for part in text.split(",") if part.strip())


def _closing(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)
