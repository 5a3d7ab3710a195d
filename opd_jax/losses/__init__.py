"""Per-token objectives: pure functions of log-probabilities, in float32, reduced over the vocabulary only.

Each has the gradient that its name says; the batch mean is the caller's.
"""

from opd_jax.losses._divergences import reverse_kl
from opd_jax.losses._policy_gradient import clipped_policy_gradient, group_advantages, sampled_reverse_kl

__all__ = ["clipped_policy_gradient", "group_advantages", "reverse_kl", "sampled_reverse_kl"]
