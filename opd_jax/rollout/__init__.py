"""Sampling from the student: one compiled prefill and one compiled decode loop."""

from opd_jax.rollout._generate import Rollout, bucket, generate
from opd_jax.rollout._sampling import Sampling, sample

__all__ = ["Rollout", "Sampling", "bucket", "generate", "sample"]
