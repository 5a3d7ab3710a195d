"""What programs need of a device that no compiler here compiles for: their arrays, added up by hand.

Arguments and outputs are exact, by their shapes and shardings. Temporaries are those that a program must
have at its fullest moment if XLA reuses memory well: what is gathered of sharded weights, the activations of
the layer at work, what the backward pass keeps, gradients, logits of a chunk. Attention is taken to be a
kernel that never holds its scores. All sums are bytes of one device.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from opd_jax.models import DecoderConfig
from opd_jax.parallel import row_shards
from opd_jax.training._memory import shard_bytes
from opd_jax.training._plan_advice import cache_bytes
from opd_jax.training._plan_programs import Program, Shapes

_FLOAT = 4
_LOGITS = 5  # of student and teacher, their log-probs, and a gradient
_LAYERS = 2  # gathered at a time: the one at work and the next


class Need(NamedTuple):
    """Bytes of one device, and FLOPs of a step.

    Attributes:
        arguments, temporaries, outputs: bytes; what is donated counts as an argument.
        flops: recomputation included.
    """

    arguments: float
    temporaries: float
    outputs: float
    flops: float


def need(program: Program, run: Shapes) -> Need:
    """What a program needs."""
    config, name = run.config, program.name
    arguments = program.argument_bytes
    flops = program.useful / run.mesh.size
    at_once = (config.rollout_batch or config.batch_size) // row_shards(run.mesh)
    if name == "prefill":
        work = _layer(run.student, run, at_once, run.prompt_width)
        return Need(arguments, work + _gathered(run.student, run), _rollout_state(run, at_once), flops)
    if name == "decode":
        logits = at_once * _vocabulary(run.student, run) * _LOGITS * _FLOAT
        heads = _gathered(run.student, run) + _head(run.student, run)
        return Need(arguments + _rollout_state(run, at_once), logits + heads, 0, flops)
    rows = config.batch_size // config.micro_batches // row_shards(run.mesh)
    if name == "update":
        passes = 2 if run.frozen is not None else 3  # forward, and backward to inputs and to weights
        recomputed = 1 + 1 / passes if config.student.remat != "none" else 1
        return Need(arguments, _training(run, rows), 0, recomputed * flops)
    if name == "measure":
        work = _layer(run.student, run, rows, _width(run)) + _gathered(run.student, run)
        return Need(arguments, _cast(run) + work + _chunk(run), 0, flops)
    sizes = _scorer(name, run)
    hidden = config.batch_size // row_shards(run.mesh) * config.max_new_tokens * sizes.width * _item(run)
    work = _layer(sizes, run, rows, _width(run)) + _gathered(sizes, run)
    if name == "score reference":
        return Need(arguments, work + _chunk(run), 0, flops)
    return Need(arguments, work + hidden, hidden, flops)  # once by micro-batches, once in the rows' order


def _training(run: Shapes, rows: int) -> float:
    """Gradients so far and of this micro-batch, weights in the computation dtype, what layers keep, one layer
    at work in both directions, and a chunk of the loss."""
    sizes, config = run.student, run.config
    trained = jax.tree.leaves(run.state.params)
    gradients = 2 * sum(map(shard_bytes, trained))
    stream = rows * _width(run) * sizes.width * _item(run)
    one = _layer(sizes, run, rows, _width(run))
    kept = {"none": sizes.layers * one, "block": sizes.layers * stream, "offload": 2 * stream}
    kept_here = kept[config.student.remat]
    return gradients + _cast(run) + kept_here + 2 * one + 2 * _gathered(sizes, run) + _chunk(run)


def _cast(run: Shapes) -> float:
    """The trained weights in the computation dtype."""
    if run.config.student.dtype == "float32":
        return 0
    trained = jax.tree.leaves(run.state.params)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in trained) * _item(run)


def _chunk(run: Shapes) -> float:
    """Logits of a chunk, and the unembeddings with the gradient of the student's."""
    config = run.config
    heads = [run.student, *(model.config for model in run.teachers)]
    logits = config.loss_chunk * _vocabulary(run.student, run) * _LOGITS * _FLOAT
    gradient = run.student.width * _vocabulary(run.student, run) * _FLOAT
    return logits + gradient + sum(_head(each, run) for each in heads)


def _layer(sizes: DecoderConfig, run: Shapes, rows: int, width: int) -> float:
    """Activations of a layer at work: its input, normalised and summed, and the wider of its two halves."""
    tensor = run.mesh.shape["tensor"]
    attention = (2 * sizes.heads + 2 * sizes.kv_heads) * sizes.head_width
    return rows * width * (3 * sizes.width + max(attention, 3 * sizes.ff_width) / tensor) * _item(run)


def _gathered(sizes: DecoderConfig, run: Shapes) -> float:
    """Layers' weights that are whole over mesh.fsdp while they are used."""
    if run.mesh.shape["fsdp"] == 1:
        return 0
    attention = 2 * (sizes.heads + sizes.kv_heads) * sizes.head_width
    weights = sizes.width * (attention + 3 * sizes.ff_width)
    return _LAYERS * weights * _item(run) / run.mesh.shape["tensor"]


def _head(sizes: DecoderConfig, run: Shapes) -> float:
    return sizes.width * _vocabulary(sizes, run) * _item(run) if run.mesh.shape["fsdp"] > 1 else 0


def _vocabulary(sizes: DecoderConfig, run: Shapes) -> float:
    return sizes.vocab_size / run.mesh.shape["tensor"]


def _rollout_state(run: Shapes, rows: int) -> float:
    """The cache, and tokens and two log-probs of each new one."""
    return cache_bytes(run) + rows * run.config.max_new_tokens * 3 * _FLOAT


def _scorer(name: str, run: Shapes) -> DecoderConfig:
    if name == "score reference":
        return run.reference.config
    names = list(run.config.all_teachers)
    if not run.teachers:
        return run.student
    return run.teachers[0 if name == "score" else names.index(name.removeprefix("score "))].config


def _item(run: Shapes) -> int:
    return 2 if run.config.student.dtype == "bfloat16" else np.dtype("float32").itemsize


def _width(run: Shapes) -> int:
    return run.prompt_width + run.config.max_new_tokens
