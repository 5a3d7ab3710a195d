"""Whether a teacher can score what a student writes, found out before any weight is loaded."""

from typing import Any


def check_pair(
    student: Any, teacher: Any, *, stops: tuple, teacher_stops: tuple, chat: bool, name: str = "teacher"
) -> None:
    """Compares the tokenizers of student and teacher.

    Args:
        student: the student's `transformers` tokenizer.
        teacher: the teacher's.
        stops: ids that end the student's completions.
        teacher_stops: ids that end the teacher's.
        chat: whether prompts pass through a chat template.
        name: of the teacher, for the error.

    Raises:
        ValueError: if the same text or the same end would mean different tokens to the two; all that
            differs, and what would be right.
    """
    problems = []
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        differing = sorted(
            (t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)),
            key=lambda t: (mine.get(t, theirs.get(t)), t),
        )
        token = differing[0]
        problems.append(
            f"their vocabularies differ in {len(differing)} entries: {token!r} is id {mine.get(token)} "
            f"to the student ({len(mine)} entries) and {theirs.get(token)} to the teacher ({len(theirs)}); "
            "distillation token by token needs two models of one tokenizer (see teacher.align)"
        )
    elif set(stops) != set(teacher_stops):
        names = [sorted(map(str, student.convert_ids_to_tokens(list(s)))) for s in (stops, teacher_stops)]
        problems.append(
            f"the student ends with {names[0]} and the teacher with {names[1]}: the student would learn "
            "never to stop; in local copies of the two folders, make the tokenizer's eos_token and "
            "generation_config.json's eos_token_id equal"
        )
    if chat and student.chat_template != teacher.chat_template:
        which = [
            "none" if t.chat_template is None else f"one of {len(t.chat_template)} characters"
            for t in (student, teacher)
        ]
        problems.append(
            f"their chat templates differ (student: {which[0]}, teacher: {which[1]}): the teacher would "
            "score prompts in a form it does not know; give both folders the same chat_template.jinja, or "
            "set data.chat: never"
        )
    if problems:
        raise ValueError(f"the {name} does not fit the student:\n" + "\n".join(f"  - {p}" for p in problems))


def check_width(name: str, vocab_size: int, tokenizer: Any) -> None:
    """Raises ValueError if a model cannot produce every token of the tokenizer."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(
            f"the {name}'s tokenizer has ids up to {largest}, but its model has a vocabulary of {vocab_size}"
        )
