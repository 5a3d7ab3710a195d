"""Eight virtual CPU devices for all tests, and what several of them share."""

import importlib.util
import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its threads fight with XLA's

import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opd_jax import models

jax.config.update("jax_num_cpu_devices", 8)  # before the backend starts

# Each run of the loop makes its own jitted functions: what one test compiled serves the next, in all workers.
if "OPD_JAX_TEST_CACHE" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="opd_jax-tests-")
    os.environ["OPD_JAX_TEST_CACHE"] = _CACHE.name
jax.config.update("jax_compilation_cache_dir", os.environ["OPD_JAX_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(items) -> None:
    """What takes long comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("network", "tpu", "slow"))))


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


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles what a module runs without XLA's optimisations, in little more than half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def make_model():
    """Builds a random decoder of a few thousand parameters.

    Its weights are larger than usual, so that logits differ by more than 1 and depend on the context, but not
    so large that rounding errors grow on their way: a relative error of 6e-8 in them moves no log-prob by
    more than about 3e-6. They come from numpy, since JAX would compile a program for each.
    """
    deviations = {"embedding": 1.0, "layers": 0.06, "head": 0.3}

    @cache  # modules are used functionally here: nobody changes them
    def make(seed: int = 0, **changes) -> models.Decoder:
        sizes = dict(vocab_size=32, width=16, layers=2, heads=2, kv_heads=1, head_width=8, ff_width=24)
        config = models.DecoderConfig(
            **sizes | dict(architecture="Qwen3ForCausalLM", qk_norm=True, max_length=256) | changes
        )
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0))))
        rng = np.random.default_rng(seed)

        def fill(path, leaf):
            names = [key.key for key in path if hasattr(key, "key")]
            if names[-1] == "scale":
                values = rng.uniform(0.8, 1.2, leaf.shape) * (3 if names[0] == "layers" else 1)
            else:
                values = rng.normal(0, deviations[names[0]], leaf.shape)
            return jnp.asarray(values, jnp.float32)

        return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, shapes))

    return make


class Bag(nnx.Module):
    """A user's own model with the bare protocol: the mean of the tokens seen, and where they stand."""

    def __init__(self, rngs, vocab=32):
        self.embedding = nnx.Param(2 * jax.random.normal(rngs.params(), (vocab, 12)))
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (12, vocab)))

    def init_cache(self, batch, slots):
        return jnp.zeros((batch, slots, 12)), jnp.zeros((), jnp.int32)

    def __call__(self, tokens, positions=None, cache=None, mask=None):
        batch, new = tokens.shape
        values, length = self.init_cache(batch, new) if cache is None else cache
        if positions is None:
            positions = jnp.broadcast_to(length + jnp.arange(new), (batch, new))
        x = self.embedding[...][tokens] * jnp.cos(0.3 * positions)[..., None]
        values = jax.lax.dynamic_update_slice(values, x, (0, length, 0))
        seen = jnp.arange(values.shape[1]) <= length + jnp.arange(new)[:, None]
        seen = jnp.broadcast_to(seen, (batch, *seen.shape))
        if mask is not None:
            seen &= mask[:, None]
        mean = seen.astype(jnp.float32) @ values / seen.sum(-1, keepdims=True)
        return (mean + x) @ self.kernel[...], (values, length + new)


@pytest.fixture(scope="session")
def bare_model():
    return Bag(nnx.Rngs(0))


@pytest.fixture(scope="session")
def smollm2():
    """The folder that scripts/fetch_smollm2.py makes, kept in its cache between runs."""
    script = Path(__file__).parents[1] / "scripts" / "fetch_smollm2.py"
    spec = importlib.util.spec_from_file_location("fetch_smollm2", script)
    fetch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetch)
    folder = fetch.default_folder()
    if not (folder / "config.json").exists():
        try:
            fetch.fetch(folder)
        except OSError as error:
            pytest.skip(f"could not fetch SmolLM2: {error}")
    return folder
