"""What a finished run came to."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        model: folder of the trained model.
        before, after: evaluations of the student, {"accuracy": ..., "accuracy_error": ...,
            "pass@k": ...}; empty without `evaluation.prompts`.
        teacher: the same of the teacher, if `evaluation.teacher`.
        seconds: spent in steps, over all starts of the run.
        tokens: completion tokens trained on.
        prompt: a prompt of the training data.
        reached: (steps, tokens) at the first evaluation with accuracy `evaluation.target`; None: never.
        searches: accepted searches, seconds and tokens that all searches took; None without extrapolation.
    """

    model: Path
    before: dict[str, float]
    after: dict[str, float]
    teacher: dict[str, float]
    seconds: float
    tokens: int
    prompt: str
    reached: tuple[int, int] | None = None
    searches: tuple[int, float, int] | None = None
