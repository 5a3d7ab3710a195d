"""Prompts, verifiable rewards and evaluation."""

from opd_jax.tasks import arithmetic as arithmetic
from opd_jax.tasks._align import Alignment as Alignment
from opd_jax.tasks._align import Retokenized as Retokenized
from opd_jax.tasks._align import align as align
from opd_jax.tasks._align import retokenize as retokenize
from opd_jax.tasks._align import token_bytes as token_bytes
from opd_jax.tasks._evaluate import Evaluation as Evaluation
from opd_jax.tasks._evaluate import Record as Record
from opd_jax.tasks._evaluate import evaluate as evaluate
from opd_jax.tasks._evaluate import pass_at_k as pass_at_k
from opd_jax.tasks._prompts import PromptBatch as PromptBatch
from opd_jax.tasks._prompts import Prompts as Prompts
from opd_jax.tasks._render import decode as decode
from opd_jax.tasks._render import encode_completion as encode_completion
from opd_jax.tasks._render import fill as fill
from opd_jax.tasks._render import render as render
from opd_jax.tasks._sources import load as load
from opd_jax.tasks._task import Example as Example
from opd_jax.tasks._task import Subset as Subset
from opd_jax.tasks._task import Task as Task
from opd_jax.tasks._verifiers import final_answer as final_answer
from opd_jax.tasks._verifiers import get_verifier as get_verifier
