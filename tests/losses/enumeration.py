"""Every divergence once more, in float64 and as its definition reads; gradients by central differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax import losses


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(a, b):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0, a * (np.log(a) - np.log(b)), 0).sum(-1)


def entropy(a):
    return -np.where(a > 0, a * np.log(np.where(a > 0, a, 1)), 0).sum(-1)


def jsd(p, q, beta):
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


# name: (the function, its definition of p (student) and q (teacher))
DIVERGENCES = {
    "forward_kl": (losses.forward_kl, lambda p, q: kl(q, p)),
    "reverse_kl": (losses.reverse_kl, lambda p, q: kl(p, q)),
    "total_variation": (losses.total_variation, lambda p, q: np.abs(p - q).sum(-1) / 2),
    "jsd": (losses.jsd, lambda p, q: jsd(p, q, 0.5)),
    "jsd 0.1": (partial(losses.jsd, beta=0.1), lambda p, q: jsd(p, q, 0.1)),
    "jsd 0.9 scaled": (partial(losses.jsd, beta=0.9, scaled=True), lambda p, q: jsd(p, q, 0.9) / 0.09),
    "skew_kl": (losses.skew_kl, lambda p, q: kl(q, 0.1 * q + 0.9 * p)),
    "skew_reverse_kl": (losses.skew_reverse_kl, lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    "mixed_kl": (
        partial(losses.mixed_kl, forward_weight=0.3),
        lambda p, q: 0.3 * kl(q, p) + 0.7 * kl(p, q),
    ),
    "entropy_aware_kl": (
        partial(losses.entropy_aware_kl, threshold=0.8),
        lambda p, q: kl(p, q) + np.where(entropy(q) > 0.8, kl(q, p), 0),
    ),
}
FINITE = ("total_variation", "jsd", "jsd 0.1", "skew_kl", "skew_reverse_kl")


def differences(function, logits, step=1e-5):
    """The gradient of a function of probabilities in logits [..., V], one value a row, in float64."""
    logits = np.asarray(logits, np.float64)
    columns = []
    for v in range(logits.shape[-1]):
        bump = np.zeros(logits.shape[-1])
        bump[v] = step
        columns.append((function(softmax(logits + bump)) - function(softmax(logits - bump))) / (2 * step))
    return np.stack(columns, axis=-1)


def of_logits(divergence, student, teacher, **options):
    return _value(partial(divergence, **options) if options else divergence, student, teacher)


def gradient(divergence, student, teacher, **options):
    """In the student's logits, of the sum over rows."""
    divergence = partial(divergence, **options) if options else divergence
    return np.asarray(_gradient(divergence, jnp.asarray(student), teacher))


@partial(jax.jit, static_argnums=0)  # one compilation instead of one for each operation
def _value(divergence, student, teacher):
    return divergence(jax.nn.log_softmax(student), jax.nn.log_softmax(teacher))


@partial(jax.jit, static_argnums=0)
def _gradient(divergence, student, teacher):
    return jax.grad(lambda s: _value(divergence, s, teacher).sum())(student)
