"""What to change where a program of a plan does not fit, or waits for something else than its products."""

from typing import Any

from opd_jax.parallel import row_shards
from opd_jax.training._plan_programs import Shapes

_GIB = 2.0**30


def advice(one: Any, run: Shapes) -> str:
    """A sentence about a `ProgramPlan`, or nothing."""
    rollout = one.name in ("prefill", "decode")
    if one.fits is False:
        return _smaller_rollout(one, run) if rollout else _smaller_training(run)
    if one.name == "update" and one.bottleneck == "memory" and (found := _larger_chunks(run)):
        return found
    if one.bottleneck == "links":
        return _fewer_messages(one, run)
    if one.bottleneck == "memory" and one.name == "decode":
        return "each token reads all weights and the cache: more rows a device share the weights' reading"
    return ""


def cache_bytes(run: Shapes) -> float:
    """Of the keys and values of the rollouts that are sampled at once, a device's share."""
    sizes, config = run.student, run.config
    width = 4 if config.student.dtype == "float32" else 2
    token = 2 * sizes.layers * sizes.kv_heads * sizes.head_width * width
    tensor = run.mesh.shape["tensor"] if sizes.kv_heads % run.mesh.shape["tensor"] == 0 else 1
    rows = (config.rollout_batch or config.batch_size) / row_shards(run.mesh)
    return rows * (run.prompt_width + config.max_new_tokens) * token / tensor


def _smaller_rollout(one: Any, run: Shapes) -> str:
    cache, rows = cache_bytes(run), row_shards(run.mesh)
    at_once = run.config.rollout_batch or run.config.batch_size
    each, whole = at_once // rows, run.config.batch_size // rows
    text = f"the cache of {each} rows a device is {cache / _GIB:.1f} GiB"
    if one.limit is None:
        return text
    room = max(one.limit - one.others, 0) / 1.5  # half as much again for temporaries
    fewer = min(int(each * room / cache), each - 1) if cache else 0
    fewer = max((n for n in range(1, fewer + 1) if whole % n == 0), default=0)
    if not fewer:
        return f"{text}: more chips, fewer max_new_tokens, or a larger mesh.tensor"
    return f"{text}: sample fewer at once (rollout_batch {fewer * rows} may fit), or use more chips"


def _smaller_training(run: Shapes) -> str:
    config, mesh = run.config, run.mesh
    rows = row_shards(mesh)
    if config.student.remat == "none":
        return "student.remat block recomputes layers instead of storing them"
    if config.batch_size // config.micro_batches > rows:
        return f"micro_batches {2 * config.micro_batches}: fewer rows at a time"
    tensor = mesh.shape["tensor"]
    if run.student.kv_heads % (2 * tensor) == 0 and mesh.shape["fsdp"] % 2 == 0:
        fewer = mesh.shape["fsdp"] // 2
        return f"mesh.fsdp {fewer} x mesh.tensor {2 * tensor} splits each row's activations; or more chips"
    return "more chips, or fewer max_new_tokens"


def _larger_chunks(run: Shapes) -> str:
    config = run.config
    rows = config.batch_size // config.micro_batches // row_shards(run.mesh)
    tokens = rows * config.max_new_tokens
    if 2 * config.loss_chunk <= tokens:
        chunks = -(-tokens // config.loss_chunk)
        return (
            f"each of the {chunks} chunks of a micro-batch's loss reads the unembedding matrices: a larger "
            f"loss_chunk (it is {config.loss_chunk} tokens a device) moves less"
        )
    return ""


def _fewer_messages(one: Any, run: Shapes) -> str:
    if one.name == "decode":
        return (
            "every token gathers the weights: a larger mesh.tensor and smaller mesh.fsdp keep them in place"
        )
    if run.mesh.shape["tensor"] > 1:
        return "a smaller mesh.tensor sends fewer activations"
    return "fewer micro_batches gather the weights less often" if run.config.micro_batches > 1 else ""
