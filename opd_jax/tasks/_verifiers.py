"""Rewards for completions with a reference answer."""

import re
from collections.abc import Callable

from opd_jax.tasks import _math
from opd_jax.tasks._names import entry_point, nearest
from opd_jax.tasks._task import Example

Verifier = Callable[[str, Example], float]

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_PHRASE = re.compile(r"\b(?:answer(?: is)?\s*[:=]|answer is\b)[ \t]*\n?([^\n]*)", re.IGNORECASE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def final_answer(completion: str) -> str:
    r"""The part of a completion that states its answer, stripped.

    Text up to `</think>` is left out. Of what remains, the last of: `<answer>...</answer>`,
    `\boxed{...}`, `#### ...`, `answer: ...` or `answer is ...` (to the end of the line, without a
    final full stop); the first kind that occurs, in this order. Else all of it.

    Example:
        >>> final_answer(r"<think>3</think> So 1+1 is \boxed{2}.")
        '2'
        >>> final_answer("It is 2.\nThe answer is 2.")
        '2'
    """
    text = completion.rpartition("</think>")[2]
    if tags := _TAGS.findall(text):
        return tags[-1].strip()
    if (boxed := last_boxed(text)) is not None:
        return boxed.strip()
    if "####" in text:
        return _line(text.rpartition("####")[2])
    if phrases := _PHRASE.findall(text):
        return _line(phrases[-1])
    return text.strip()


def last_boxed(text: str) -> str | None:
    r"""What is within the last closed `\boxed{...}`, braces matched; None if there is none.

    Example:
        >>> last_boxed(r"\boxed{1} or \boxed{\frac{1}{2}} or \boxed{")
        '\\frac{1}{2}'
    """
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for end in range(match.end(), len(text)):
            escaped = text[end - 1] == "\\"
            depth += 0 if escaped else (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                return text[match.end() : end]
    return None


def _line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].strip().strip("*").removesuffix(".").strip("* ") if lines else ""


def _reference(example: Example) -> str:
    if example.answer is None:
        raise ValueError(f"an example has no answer to verify with: {example.text!r:.80}")
    return example.answer


def exact(completion: str, example: Example) -> float:
    """1 if the final answer equals the reference's, up to white space; see `final_answer`."""
    ours, theirs = (" ".join(final_answer(text).split()) for text in (completion, _reference(example)))
    return float(ours == theirs)


def contains(completion: str, example: Example) -> float:
    """1 if the reference occurs in the completion as a word of its own (2 is not in 12, 2.5 or -2).

    Rewards a completion that lists many answers: for evaluation rather than for training.
    """
    answer = re.escape(_reference(example).strip())
    return float(re.search(rf"(?<![\w-])(?<!\d[.,]){answer}(?!\w)(?![.,]\d)", completion) is not None)


def math(completion: str, example: Example) -> float:
    r"""1 if the final answer equals the reference as mathematics (`1/2`, `\frac{1}{2}`, `0.5`).

    By math-verify, in a process of its own: an answer such as 9^{9^{9^9}} costs a time-out, not the
    run. Looks at the last `\boxed{...}` after `</think>`, else at the last expression.
    """
    text = completion.rpartition("</think>")[2]
    boxed = last_boxed(text)
    ours = text if boxed is None else f"\\boxed{{{boxed}}}"
    return float(_math.equal(_reference(example), ours))


_VERIFIERS: dict[str, Verifier] = {"exact": exact, "contains": contains, "math": math}


def get_verifier(name: str) -> Verifier:
    """The verifier called `name`: `exact`, `contains`, `math` or `package.module:function`.

    Raises:
        ValueError: for an unknown name, naming the nearest.
    """
    if ":" in name:
        return entry_point(name)
    if name not in _VERIFIERS:
        raise ValueError(
            f"unknown verifier {name!r}{nearest(name, _VERIFIERS)}; it must be one of "
            f"{', '.join(_VERIFIERS)}, or package.module:function"
        )
    return _VERIFIERS[name]
