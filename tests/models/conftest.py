from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opd_jax import models

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())


@pytest.fixture
def golden(request):
    """The folder of a golden model."""
    return GOLDENS / request.param


@pytest.fixture
def tiny():
    """A random float32 decoder with every optional part."""
    config = models.DecoderConfig(
        vocab_size=40,
        width=16,
        layers=3,
        heads=4,
        kv_heads=2,
        head_width=8,
        ff_width=24,
        qk_norm=True,
        attention_bias=True,
        output_bias=True,
        architecture="Qwen3ForCausalLM",
        eos_token_ids=(2, 3),
        bos_token_id=1,
    )
    return models.Decoder(config, rngs=nnx.Rngs(0))


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 12)), jnp.int32)
