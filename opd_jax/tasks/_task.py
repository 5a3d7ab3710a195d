"""What a task is: prompts with a verifiable answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Example:
    """One prompt, and what is known about its answer.

    Example:
        >>> Example(prompt="1+1=", answer="2").text
        '1+1='
    """

    prompt: str | tuple[dict[str, str], ...]
    """Plain text, or chat messages `{"role": ..., "content": ...}` that end with the user's."""
    answer: str | None = None
    """The reference answer that a verifier compares with."""
    completion: str | None = None
    """A demonstration: what supervised training imitates, without EOS."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the source says about the example."""

    @property
    def text(self) -> str:
        """The prompt as plain text: message contents, a blank line between them."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(message["content"] for message in self.prompt)


@runtime_checkable
class Task(Protocol):
    """A finite, random-access set of examples with a verifier.

    `task[i]` is deterministic and raises IndexError from `len(task)` on.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def verify(self, completion: str, example: Example) -> float:
        """The reward of `completion`, from 0 (wrong) to 1 (right)."""
        ...


class Subset:
    """Some examples of a task, as a task.

    Args:
        task: whose examples.
        ids: [n] their indices in it, in the order wanted; may repeat.
    """

    def __init__(self, task: Task, ids: Sequence[int]):
        self._task, self.ids, self.name = task, ids, task.name

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        return self._task[int(self.ids[index])]

    def verify(self, completion: str, example: Example) -> float:
        """As the task's."""
        return self._task.verify(completion, example)
