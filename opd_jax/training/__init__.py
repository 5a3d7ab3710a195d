"""The train steps, and the loop around them."""

from opd_jax.training._cache_teacher import cache_teacher
from opd_jax.training._errors import Interrupted, TrainingError
from opd_jax.training._loop import train
from opd_jax.training._objectives import Objective, Tokens
from opd_jax.training._plan import Plan, ProgramPlan, plan
from opd_jax.training._plan import search as search_plans
from opd_jax.training._result import Result
from opd_jax.training._step import Batch, State, make_score, make_update

__all__ = [
    "Batch",
    "Interrupted",
    "Objective",
    "Plan",
    "ProgramPlan",
    "Result",
    "State",
    "Tokens",
    "TrainingError",
    "cache_teacher",
    "make_score",
    "make_update",
    "plan",
    "search_plans",
    "train",
]
