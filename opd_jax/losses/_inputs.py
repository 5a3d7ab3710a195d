"""What comes before a divergence: log-probabilities from logits, and checks of what was given."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def log_softmax(logits: ArrayLike, temperature: float = 1.0) -> jax.Array:
    r"""Log-probabilities of the next token at a temperature, in float32.

    .. math:: \log p_v = z_v / T - \log \sum_u e^{z_u / T}

    Use it for *both* models: a student at T against a teacher at 1 is another objective. The gradient of
    any divergence in the student's logits then carries a factor 1 / T from the chain rule, and near
    agreement another 1 / T, since the two distributions approach each other as T grows: about 1 / T^2 in
    all. Nothing is multiplied back in; where learning rates shall not depend on T, multiply the loss by
    T^2 yourself. On-policy distillation scores the law that was sampled, so T is 1 there unless the
    rollout used the same T.

    Args:
        logits: [..., V].
        temperature: T, positive.

    Returns:
        [..., V] float32.

    Raises:
        ValueError: if the temperature is not positive and finite.

    Example:
        >>> import jax.numpy as jnp
        >>> print(log_softmax(jnp.array([0.0, 2.0]), temperature=0.5).round(2))
        [-4.02 -0.02]

    References:
        Hinton et al., `arXiv:1503.02531 <https://arxiv.org/abs/1503.02531>`_
    """
    check_temperature(temperature)
    logits = jnp.asarray(logits).astype(jnp.float32)
    return jax.nn.log_softmax(logits if temperature == 1.0 else logits / temperature)


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def common_vocabulary(
    student_logits: ArrayLike, teacher_logits: ArrayLike, size: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The logits of the tokens that both models have: the common prefix of two padded vocabularies.

    Models of one family pad their vocabulary differently (Qwen2.5: 151,936 and 152,064). Cut the
    *logits*, before the softmax, so that both distributions are normalised over the same tokens; nothing
    is copied from one model to the other.

    Args:
        student_logits: [..., V] of the student.
        teacher_logits: [..., V'] of the teacher.
        size: tokens that the tokenizer has; None for all of the shorter one, padding included.

    Returns:
        Both, [..., min(V, V', size)].

    Raises:
        ValueError: if `size` is not between 1 and the shorter vocabulary.

    Example:
        >>> import jax.numpy as jnp
        >>> [a.shape for a in common_vocabulary(jnp.zeros((2, 7)), jnp.zeros((2, 9)), size=6)]
        [(2, 6), (2, 6)]
    """
    student_logits, teacher_logits = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    shared = common_size(student_logits.shape[-1], teacher_logits.shape[-1], size)
    return student_logits[..., :shared], teacher_logits[..., :shared]


def common_size(student: int, teacher: int, size: int | None) -> int:
    shared = min(student, teacher)
    if size is None:
        return shared
    if not 1 <= size <= shared:
        raise ValueError(
            f"the common vocabulary must have 1 to {shared} tokens (student {student}, teacher {teacher}),"
            f" got size={size}"
        )
    return size


def floor_log_probs(teacher_log_probs: ArrayLike, minimum: float = -30.0) -> jax.Array:
    r"""Teacher log-probabilities with a lower bound, where a reverse KL would otherwise be infinite.

    .. math:: \log q'_v = \max(\log q_v, m)

    For the *teacher* alone: the student's gradient then stays that of a reverse KL with q' in the place
    of q, pushing mass away from what the teacher excludes with a log-ratio of at most -m. On the student's
    side a floor would have gradient 0 just where the student misses what the teacher says. q' is not
    renormalised: its mass is at most 1 + V e^m, and a reverse KL at least -log(1 + V e^m).

    Args:
        teacher_log_probs: [..., V].
        minimum: m, negative.

    Returns:
        [..., V] float32; NaN stays NaN.

    Raises:
        ValueError: if the minimum is not negative and finite.
    """
    if not -float("inf") < minimum < 0:
        raise ValueError(f"minimum must be negative and finite, got {minimum}")
    return jnp.maximum(jnp.asarray(teacher_log_probs).astype(jnp.float32), minimum)


def check_log_probs(
    student_log_probs: ArrayLike,
    teacher_log_probs: ArrayLike,
    where: ArrayLike | None = None,
    tolerance: float = 1e-3,
) -> None:
    """Raises if two arrays are not distributions that can be compared; for use outside jit.

    It reads the values, so it costs a pass over them and cannot run under a trace. Inside a program,
    broken inputs show in the loss: NaN gives NaN, and support that the teacher excludes gives infinity.

    Args:
        student_log_probs: [..., V].
        teacher_log_probs: [..., V].
        where: 1 where a token counts, [...]; the others are not looked at.
        tolerance: how far from 1 the sum of the probabilities may be.

    Raises:
        ValueError: naming the first bad position, if the shapes differ, anything is NaN or not normalised,
            or the teacher has probability 0 where the student has not.
        TypeError: under a trace.

    Example:
        >>> import numpy as np
        >>> check_log_probs(np.log([[0.5, 0.5]]), np.log([[0.5, 0.4]]))
        Traceback (most recent call last):
            ...
        ValueError: teacher log-probs at (0,) are not normalised: probabilities sum to 0.9
    """
    if isinstance(student_log_probs, jax.core.Tracer) or isinstance(teacher_log_probs, jax.core.Tracer):
        raise TypeError(
            "check_log_probs reads values, which a traced array does not have; call it outside jit"
        )
    both = {"student": student_log_probs, "teacher": teacher_log_probs}
    both = {name: np.asarray(jnp.asarray(a).astype(jnp.float32), np.float64) for name, a in both.items()}
    student, teacher = both["student"], both["teacher"]
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher log-probs must have one shape, got {student.shape} and {teacher.shape};"
            " see common_vocabulary for vocabularies padded differently"
        )
    counts = np.broadcast_to(True if where is None else np.asarray(where, bool), student.shape[:-1])

    def first(bad: np.ndarray) -> tuple[int, ...] | None:
        found = np.argwhere(bad & counts)
        return tuple(found[0].tolist()) if len(found) else None

    for name, log_probs in both.items():
        if (place := first(np.isnan(log_probs).any(-1))) is not None:
            raise ValueError(f"{name} log-probs at {place} are NaN")
        mass = np.exp(log_probs).sum(-1)
        if (place := first(~(np.abs(mass - 1) <= tolerance))) is not None:
            raise ValueError(
                f"{name} log-probs at {place} are not normalised: probabilities sum to {mass[place]:.6g}"
            )
    excluded = ((teacher == -np.inf) & (student > -np.inf)).any(-1)
    if (place := first(excluded)) is not None:
        raise ValueError(
            f"the teacher gives probability 0 at {place} to a token that the student can produce: the reverse"
            " KL is infinite; see floor_log_probs, or jsd and skew_reverse_kl, which stay finite"
        )
