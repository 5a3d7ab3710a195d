"""What bounds memory changes no result: parts of a rollout, chunks of the loss, donated buffers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import parallel, rollout, training
from opd_jax.parallel import make_mesh
from opd_jax.training import _batches, _setup
from opd_jax.training._logging import Display
from opd_jax.training._memory import _cache_bytes
from opd_jax.training._step import _chunks
from tests.training.runs import assert_same, read_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("teacher_writes", [False, True])
def test_parts_of_a_rollout_are_the_rollout(make, teacher_writes):
    """Tokens exactly. Log-probs up to what the rounding of other products becomes in this model, whose
    weights are large; bitwise they are those of the sampler called for a part of the rows alone."""
    changes = dict(lmbda=0.0, off_policy="teacher") if teacher_writes else dict(samples_per_prompt=2)
    found = []
    for rows in (0, 4) if teacher_writes else (0, 4, 1):
        setup, state = _setup.prepare(make(rollout_batch=rows, **changes), Display(total=1))
        batch, metrics = _batches.make_batch(setup, state.params, 0, jax.random.key(3), lambda _: None)
        found.append((rows or 8, jax.tree.map(np.asarray, batch), metrics, _cache_bytes(setup, state)))
    _, whole, metrics, cache = found[0]
    assert len({row.tobytes() for row in whole.completions}) > 4
    for rows, parts, others, smaller in found[1:]:
        for name in ("prompts", "completions", "mask", "weights"):
            np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), err_msg=name)
        if not teacher_writes:
            np.testing.assert_allclose(parts.rollout_log_probs, whole.rollout_log_probs, atol=1e-4)
            some = np.arange(8 - rows, 8)
            alone = rollout.generate(
                setup.model(state.params), whole.prompts[some], jax.random.key(3), row_ids=some,
                prompt_lengths=whole.prompt_lengths[some], max_new_tokens=8, stop_token_ids=setup.stops,
            )  # fmt: skip
            np.testing.assert_array_equal(parts.rollout_log_probs[some], alone.log_probs)
        assert others == metrics and smaller == cache * rows / 8


def test_parts_spread_over_the_mesh(make, one_device):
    one_device.undo()
    with pytest.raises(ValueError, match=r"rollout_batch is 4: .* = 1 x 8 = 8 devices; .* a multiple of 8"):
        _setup.prepare(make(rollout_batch=4), Display(total=1))


@pytest.mark.parametrize(
    ("sizes", "shards"), [((1, 1, 1), 1), ((1, 4, 2), 4), ((2, 2, 2), 4), ((2, 4, 1), 8)]
)
def test_a_chunk_is_so_many_tokens_of_each_device(sizes, shards):
    """The largest shard of logits is that of `loss_chunk` tokens, on any mesh."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    rows = jax.ShapeDtypeStruct((8, 64, 3), jnp.float32)
    with jax.set_mesh(mesh):
        assert parallel.row_shards() == shards
        chunks, batch, width, _ = jax.eval_shape(lambda a: _chunks(a, 32), rows).shape
    assert batch == 8 and 8 // shards * width == 32 and chunks * width == 64
    assert parallel.row_shards() == 1 and jax.eval_shape(lambda a: _chunks(a, 32), rows).shape[2] == 4


def test_a_run_with_a_bfloat16_moment_is_resumed_bitwise(make):
    """Checkpoints hold it as it is."""
    settings = dict(optimizer__mu_dtype="bfloat16", steps=3)
    whole = training.train(make("whole", **settings))
    training.train(make("parts", **settings | dict(steps=1)))
    assert_same(read_weights(whole.model), read_weights(training.train(make("parts", **settings)).model))
    _, state = _setup.prepare(make(**settings), Display(total=1))
    assert "bfloat16" in {str(a.dtype) for a in jax.tree.leaves(state.opt_state)}
