"""Per-token objectives: pure functions of log-probabilities, in float32, reduced over the vocabulary only.

Each has the gradient that its name says; the batch mean is the caller's. `fused` and `fused_sum` take
hidden states instead, for vocabularies whose log-probabilities do not fit.
"""

from opd_jax.losses._divergences import entropy, forward_kl, reverse_kl, total_variation
from opd_jax.losses._fused import Unembedding, fused, fused_sum
from opd_jax.losses._groups import aggregation_weights, informative_groups, overlong_penalty
from opd_jax.losses._importance import discounted_sums, importance_weights
from opd_jax.losses._inputs import check_log_probs, common_vocabulary, floor_log_probs, log_softmax
from opd_jax.losses._mixtures import entropy_aware_kl, jsd, mixed_kl, skew_kl, skew_reverse_kl
from opd_jax.losses._policy_gradient import (
    clipped_policy_gradient,
    group_advantages,
    policy_gradient,
    sampled_reverse_kl,
)
from opd_jax.losses._rewards import (
    Advantages,
    extrapolated_advantages,
    kl_estimate,
    task_and_distillation,
    token_reward,
)
from opd_jax.losses._spans import span_reverse_kl, span_sums
from opd_jax.losses._top_k import (
    Support,
    coarsen,
    sampled_tail_reverse_kl,
    top_k,
    top_k_support,
    with_tail,
)
from opd_jax.losses._weights import (
    high_entropy,
    loss_mask,
    overlap_stop,
    prefix_drift_weights,
    top_k_overlap,
)

__all__ = [
    "Advantages",
    "Support",
    "Unembedding",
    "aggregation_weights",
    "check_log_probs",
    "clipped_policy_gradient",
    "coarsen",
    "common_vocabulary",
    "discounted_sums",
    "entropy",
    "entropy_aware_kl",
    "extrapolated_advantages",
    "floor_log_probs",
    "forward_kl",
    "fused",
    "fused_sum",
    "group_advantages",
    "high_entropy",
    "importance_weights",
    "informative_groups",
    "jsd",
    "kl_estimate",
    "log_softmax",
    "loss_mask",
    "mixed_kl",
    "overlap_stop",
    "overlong_penalty",
    "policy_gradient",
    "prefix_drift_weights",
    "reverse_kl",
    "sampled_reverse_kl",
    "sampled_tail_reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "span_reverse_kl",
    "span_sums",
    "task_and_distillation",
    "token_reward",
    "top_k",
    "top_k_overlap",
    "top_k_support",
    "total_variation",
    "with_tail",
]
