"""Examples as token ids: templates, chat templates, special tokens."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from opd_jax.tasks._task import Example

Chat = Literal["auto", "never"]

_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")


def fill(template: str, example: Example) -> str:
    r"""Fills `{prompt}`, `{answer}`, `{completion}` and `{metadata key}` into `template`.

    `{prompt}` is the last user message. As in Python's format strings `{{` and `}}` stand for
    single braces; other braces that enclose no name are left alone, so `\boxed{}` needs no care.

    Raises:
        ValueError: for a field that the example lacks, listing those it has.

    Example:
        >>> fill(r"{prompt} Hint: \boxed{{{answer}}}", Example("1+1?", answer="2"))
        '1+1? Hint: \\boxed{2}'
    """
    known = {"answer": example.answer, "completion": example.completion}
    fields = {
        **example.metadata,
        **{name: value for name, value in known.items() if value is not None},
        "prompt": _last_user(example)[1],
    }

    def replace(match: re.Match) -> str:
        if match[1] is None:
            return match[0][0]
        if match[1] not in fields:
            raise ValueError(
                f"the template names the field {{{match[1]}}}, which this example lacks; "
                f"it has {', '.join(sorted(fields))}"
            )
        return str(fields[match[1]])

    return _FIELD.sub(replace, template)


def with_template(example: Example, template: str | None) -> Example:
    """The example whose last user message is `template`, filled in."""
    if template is None:
        return example
    text = fill(template, example)
    if isinstance(example.prompt, str):
        return dataclasses.replace(example, prompt=text)
    messages = list(example.prompt)
    index = _last_user(example)[0]
    messages[index] = {**messages[index], "content": text}
    return dataclasses.replace(example, prompt=tuple(messages))


def _last_user(example: Example) -> tuple[int, str]:
    if isinstance(example.prompt, str):
        return 0, example.prompt
    for i in reversed(range(len(example.prompt))):
        if example.prompt[i]["role"] == "user":
            return i, example.prompt[i]["content"]
    raise ValueError("the prompt has no user message")


def render(
    tokenizer: Any, example: Example, *, chat: Chat = "auto", template: str | None = None
) -> list[int]:
    """The prompt's token ids, ready for a completion to follow.

    Args:
        tokenizer: a `transformers` tokenizer.
        example: what to render.
        chat: "auto": through the tokenizer's chat template, with the header of the assistant's
            turn, if it has one; "never", or without one: as plain text (the contents of messages,
            a blank line between them) with the special tokens that the tokenizer puts in front.
        template: replaces the last user message, see `fill`; how a teacher gets to see more than
            the student: "{prompt} (The answer is {answer}.)".

    Returns:
        The token ids of the prompt.

    Raises:
        ValueError: for a template field that the example lacks, or a prompt that the chat template
            or the tokenizer refuses.
    """
    return render_all(tokenizer, [example], chat=chat, template=template)[0]


def render_all(
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    chat: Chat = "auto",
    template: str | None = None,
    first: int = 0,
) -> list[list[int]]:
    """`render` of many examples; errors call them `first`, `first + 1`, ..."""
    if chat not in ("auto", "never"):
        raise ValueError(f"chat must be 'auto' or 'never', not {chat!r}")
    through_chat = chat == "auto" and bool(getattr(tokenizer, "chat_template", None))
    texts = []
    for index, example in enumerate(examples, first):
        try:
            example = with_template(example, template)
            texts.append(_chat_text(tokenizer, example) if through_chat else example.text)
        except Exception as error:
            raise ValueError(f"prompt {index} cannot be rendered: {error}") from error
    # A chat template writes its own special tokens: adding BOS would double it.
    rows = _encode(tokenizer, texts, first, add_special_tokens=not through_chat)
    if not through_chat:
        rows = [_without_eos(tokenizer, row, text) for row, text in zip(rows, texts, strict=True)]
    return rows


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a demonstration: no special tokens in front, EOS behind.

    Raises:
        ValueError: if the tokenizer has no EOS.
    """
    return encode_completions(tokenizer, [text])[0]


def encode_completions(tokenizer: Any, texts: Sequence[str], first: int = 0) -> list[list[int]]:
    """`encode_completion` of many texts."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token, so a demonstration cannot end")
    rows = _encode(tokenizer, texts, first, add_special_tokens=False)
    return [[*row, eos] for row in rows]


def decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Token ids as text, without special tokens."""
    return [
        tokenizer.decode(
            np.asarray(row).tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for row in rows
    ]


def _chat_text(tokenizer: Any, example: Example) -> str:
    messages = example.prompt
    if isinstance(messages, str):
        messages = ({"role": "user", "content": messages},)
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)


def _encode(tokenizer: Any, texts: Sequence[str], first: int, **kwargs: Any) -> list[list[int]]:
    try:
        return tokenizer(list(texts), **kwargs)["input_ids"]
    except Exception as error:
        if len(texts) == 1:
            raise ValueError(f"text {first} cannot be tokenized: {texts[0]!r}: {error}") from error
    # One of them fails: find which, to name it.
    return [_encode(tokenizer, [text], first + i, **kwargs)[0] for i, text in enumerate(texts)]


def _without_eos(tokenizer: Any, row: list[int], text: str) -> list[int]:
    """Drops the EOS that some tokenizers append: nothing follows a text that has ended."""
    eos = tokenizer.eos_token
    ended = row and eos and row[-1] == tokenizer.eos_token_id and not text.endswith(eos)
    return row[:-1] if ended else row
