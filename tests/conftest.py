"""Eight virtual CPU devices for all tests, and what several of them share."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its threads fight with XLA's

import tempfile
from contextlib import contextmanager
from functools import cache

import jax
import pytest
from flax import nnx

from opd_jax import models

jax.config.update("jax_num_cpu_devices", 8)  # before the backend starts

# Each run of the loop makes its own jitted functions: what one test compiled serves the next.
_CACHE = tempfile.TemporaryDirectory(prefix="opd_jax-tests-")
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

_COMPILED: list[str] = []


def _on_duration(event: str, _seconds: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_on_duration)


@pytest.fixture(scope="session")
def compilations():
    """A context manager: the list it gives holds one entry for each program compiled inside."""

    @contextmanager
    def count():
        start, inside = len(_COMPILED), []
        yield inside
        inside.extend(_COMPILED[start:])

    return count


@pytest.fixture(scope="session")
def make_model():
    """Builds a random decoder of a few thousand parameters.

    Its weights are larger than usual, so that logits differ by more than 1 and depend on the context, but not
    so large that rounding errors grow on their way: a relative error of 6e-8 in them moves no log-prob by
    more than about 3e-6.
    """

    @cache  # modules are used functionally here: nobody changes them
    def make(seed: int = 0, **changes) -> models.Decoder:
        sizes = dict(vocab_size=32, width=16, layers=2, heads=2, kv_heads=1, head_width=8, ff_width=24)
        config = models.DecoderConfig(
            **sizes | dict(architecture="Qwen3ForCausalLM", qk_norm=True, max_length=256) | changes
        )
        model = models.Decoder(config, rngs=nnx.Rngs(seed))
        for part, factor in ((model, 50), (model.layers, 3 / 50), (model.head, 15 / 50)):
            params = nnx.state(part)
            nnx.update(part, jax.tree.map(lambda p, f=factor: p * f if p.ndim > 1 else p, params))
        return model

    return make
