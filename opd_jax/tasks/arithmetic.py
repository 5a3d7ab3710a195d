"""Step-by-step arithmetic over a vocabulary of 19 characters: the task of the built-in demo.

Two kinds of problem, each with exactly one canonical solution:

    534+167=        4+7=11,3+6=10,5+1=07>0701      addition, low digit first; a step's result is
                                                   <carry><digit> and contains the carry into it
    5*1-5+9-9=      5*1=5,5-5=0,0+9=9,9-9=0>0      left to right, every result modulo 10

A completion is right if what follows its first `>` is the answer. EOS is written `.`.
"""

import random
import zlib
from collections.abc import Sequence
from typing import Any

from opd_jax._extras import require
from opd_jax.tasks._task import Example

PAD, BOS, EOS = "<pad>", "<bos>", "."
CHARACTERS = "0123456789+-*=,>"
KINDS = ("addition", "chain")
MAX_PROMPT_LENGTH = 11  # tokens, BOS included
MAX_COMPLETION_LENGTH = 26  # tokens, EOS included

# The habits of a model that has the skill but does not use it reliably ("mixed" demonstrations).
JUMP = 0.25  # answers at once, without steps ...
JUMP_WRONG_DIGIT = 0.36  # ... with each digit of the answer wrong this often
SLIP = 0.08  # writes a wrong digit, per step
FORGET_CARRY = 0.4  # leaves out the carry into a step
CONFUSE_OPERATOR = 0.2  # computes a step with another operator than it writes

_OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


class _Random:
    """Draws built on `Random.random()` alone, the one stream that Python promises to keep."""

    def __init__(self, *seed: Any):
        self._random = random.Random(":".join(map(str, seed)))

    def below(self, n: int) -> int:
        return int(self._random.random() * n)

    def choice(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]

    def happens(self, probability: float) -> bool:
        return self._random.random() < probability

    def other_digit(self, digit: int) -> int:
        return (digit + 1 + self.below(9)) % 10


class _Careful(_Random):
    """Nothing that could go wrong happens."""

    def __init__(self):
        pass

    def happens(self, probability: float) -> bool:
        return False


def _problem(kind: str, rng: _Random) -> str:
    if kind == "addition":
        low = 10 ** rng.choice((1, 2))
        return f"{low + rng.below(9 * low)}+{low + rng.below(9 * low)}="
    terms = [str(rng.below(10))]
    for _ in range(rng.choice((3, 4))):
        terms += rng.choice(tuple(_OPERATORS)), str(rng.below(10))
    return "".join(terms) + "="


def _add(problem: str, rng: _Random) -> tuple[list[str], str]:
    left, right = problem.rstrip("=").split("+")
    carry, steps, digits = 0, [], ""
    for a, b in zip(reversed(left), reversed(right), strict=True):
        if carry and rng.happens(FORGET_CARRY):
            carry = 0
        carry, digit = divmod(int(a) + int(b) + carry, 10)
        if rng.happens(SLIP):
            digit = rng.other_digit(digit)
        steps.append(f"{a}+{b}={carry}{digit}")
        digits = f"{digit}{digits}"
    return steps, f"{carry}{digits}"


def _reduce(problem: str, rng: _Random) -> tuple[list[str], str]:
    value, steps = int(problem[0]), []
    for operator, digit in zip(problem[1:-1:2], problem[2::2], strict=True):
        used = operator
        if rng.happens(CONFUSE_OPERATOR):
            used = rng.choice([other for other in _OPERATORS if other != operator])
        result = _OPERATORS[used](value, int(digit)) % 10
        if rng.happens(SLIP):
            result = rng.other_digit(result)
        steps.append(f"{value}{operator}{digit}={result}")
        value = result
    return steps, str(value)


def _solve(problem: str, rng: _Random) -> tuple[str, str]:
    steps, answer = (_reduce if problem[1] in _OPERATORS else _add)(problem, rng)
    return ",".join(steps) + ">" + answer, answer


def solve(problem: str) -> tuple[str, str]:
    """The canonical completion of a problem, and its answer.

    Example:
        >>> solve("534+167=")
        ('4+7=11,3+6=10,5+1=07>0701', '0701')
        >>> solve("5*1-5+9-9=")
        ('5*1=5,5-5=0,0+9=9,9-9=0>0', '0')
    """
    return _solve(problem, _Careful())


def _mixed(problem: str, answer: str, rng: _Random) -> str:
    if not rng.happens(JUMP):
        return _solve(problem, rng)[0]
    guess = (rng.other_digit(int(d)) if rng.happens(JUMP_WRONG_DIGIT) else d for d in answer)
    return ">" + "".join(map(str, guess))


class Arithmetic:
    """The task; see `make`."""

    name = "arithmetic"

    def __init__(self, size: int, seed: int, kinds: Sequence[str], demonstrations: str, split: str | None):
        self._size = size
        self._seed = seed
        self._kinds = tuple(kinds)
        self._mixed = demonstrations == "mixed"
        self._split = split

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        index = int(index)
        if not 0 <= index < self._size:
            raise IndexError(f"example {index} of {self._size}")
        rng = _Random(self.name, self._seed, index)
        while True:
            kind = rng.choice(self._kinds)
            problem = _problem(kind, rng)
            if self._split is None or self._split == _split_of(problem):
                break
        completion, answer = solve(problem)
        if self._mixed:
            completion = _mixed(problem, answer, rng)
        return Example(problem, answer, completion, {"kind": kind})

    def verify(self, completion: str, example: Example) -> float:
        """1 if the text after the first `>` is the answer, else 0; a final EOS is no matter."""
        return float(completion.partition(">")[2].removesuffix(EOS) == example.answer)


def _split_of(problem: str) -> str:
    return "held_out" if zlib.crc32(problem.encode()) % 8 == 0 else "train"


def make(
    size: int = 10_000,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    demonstrations: str = "correct",
    split: str | None = None,
) -> Arithmetic:
    """The arithmetic task; example i is a function of (seed, i) alone.

    Args:
        size: number of examples.
        seed: another seed gives other problems (of 2-digit additions there are only 8,100, so
            some come again: use `split` to keep two sets apart).
        kinds: any of "addition" (2 or 3 digits) and "chain" (3 or 4 operations modulo 10), drawn
            with equal probability.
        demonstrations: "correct": each `completion` is the canonical solution; "mixed": it errs
            as an unreliable model does (about half of the answers are right).
        split: "train" and "held_out" never share a problem (7/8 and 1/8 of all); None: all.

    Raises:
        ValueError: for a value that is none of these.

    Example:
        >>> make(seed=3)[0].prompt == make(seed=3, demonstrations="mixed")[0].prompt
        True
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"arithmetic: size must be a positive integer, not {size!r}")
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"arithmetic: kinds must be some of {KINDS}, not {kinds!r}")
    if demonstrations not in ("correct", "mixed"):
        raise ValueError(f"arithmetic: demonstrations must be 'correct' or 'mixed', not {demonstrations!r}")
    if split not in (None, "train", "held_out"):
        raise ValueError(f"arithmetic: split must be 'train', 'held_out' or None, not {split!r}")
    return Arithmetic(size, seed, kinds, demonstrations, split)


def make_tokenizer():
    """The task's tokenizer: one token a character, BOS in front, no chat template.

    Returns:
        A `transformers.PreTrainedTokenizerFast`; ids: PAD 0, BOS 1, EOS 2, then `CHARACTERS`.
        A character outside the vocabulary raises when it is encoded.
    """
    tokenizers = require("tokenizers")
    transformers = require("transformers")
    vocabulary = {token: i for i, token in enumerate((PAD, BOS, EOS, *CHARACTERS))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )
