"""Our logits against those of transformers, committed by scripts/make_goldens.py."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax import models

from .conftest import NAMES

goldens = pytest.mark.parametrize("golden", NAMES, indirect=True)


def expected(folder):
    arrays = np.load(folder / "golden.npz")
    return jnp.asarray(arrays["tokens"], jnp.int32), arrays["logits"]


def decode(model, tokens, slots, prompt):
    """Prefills `prompt` tokens, then a few at once, then one at a time."""
    cache = model.init_cache(tokens.shape[0], slots)
    step = jax.jit(lambda model, *call: model(*call))
    prefill = jax.jit(lambda model, *call: model(*call, prefill=True))
    logits, cache = prefill(model, tokens[:, :prompt], None, cache)
    parts = [logits]
    ends = [prompt, prompt + 3, *range(prompt + 4, tokens.shape[1] + 1)]
    for start, end in itertools.pairwise(ends):
        logits, cache = step(model, tokens[:, start:end], None, cache)
        parts.append(logits)
    assert int(cache.length) == tokens.shape[1]
    return np.concatenate(parts, axis=1)


def test_every_golden_is_there():
    assert len(NAMES) == 9


@goldens
def test_full_pass_matches_transformers(golden):
    tokens, logits = expected(golden)
    model = models.load(golden, dtype="float32")
    ours = jax.jit(lambda model, tokens: model.logits(tokens))(model, tokens)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, logits, atol=1e-4, rtol=0)


@goldens
def test_cached_decode_matches_transformers(golden):
    tokens, logits = expected(golden)
    model = models.load(golden, dtype="float32")
    np.testing.assert_allclose(decode(model, tokens, 64, 20), logits, atol=1e-4, rtol=0)


@goldens
def test_bfloat16_is_close(golden):
    tokens, logits = expected(golden)
    model = models.load(golden)
    assert model.embedding.dtype == jnp.bfloat16  # As stored.
    ours = jax.jit(lambda model, tokens: model.logits(tokens))(model, tokens)
    assert ours.dtype == jnp.float32
    assert np.abs(ours - logits).mean() < 0.02 * np.abs(logits).mean() * 3
    assert (ours.argmax(-1) == logits.argmax(-1)).mean() > 0.9


@pytest.mark.torch
@goldens
def test_transformers_loads_what_we_save(golden, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokens, logits = expected(golden)
    models.save(models.load(golden, dtype="float32"), tmp_path / "saved", max_shard_bytes=20000)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager"
    ).eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        theirs = model(torch.tensor(np.asarray(tokens), dtype=torch.int64)).logits.numpy()
    np.testing.assert_array_equal(theirs, logits)
