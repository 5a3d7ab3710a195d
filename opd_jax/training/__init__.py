"""The train steps, and the loop around them."""

from opd_jax.training._loop import Interrupted, Result, TrainingError, train

__all__ = ["Interrupted", "Result", "TrainingError", "train"]
