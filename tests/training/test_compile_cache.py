"""The compiled programs that a run keeps in its folder."""

from collections import Counter

import jax
import pytest

from opd_jax import training
from opd_jax.training._compile_cache import compile_cache

NAMES = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
pytestmark = pytest.mark.usefixtures("quick_compilation")
_SEEN: Counter = Counter()
jax.monitoring.register_event_listener(lambda event, **_: _SEEN.update([event.rpartition("/")[2]]))


@pytest.fixture
def nothing_configured():
    """As for a user; conftest.py has named a folder that all tests share."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def start(settings) -> Counter:
    """A run as in a process that knows no compiled program yet: what JAX asked its cache, and got."""
    jax.clear_caches()
    before = _SEEN.copy()
    training.train(settings)
    return _SEEN - before


@pytest.mark.slow
def test_a_second_start_compiles_nothing(make, nothing_configured, tmp_path):
    first = start(make(steps=1, evaluation__prompts=0))
    assert first["cache_misses"] > 10 and first["cache_misses"] == first["compile_requests_use_cache"]
    assert len(list((tmp_path / "run" / "compile_cache").glob("*-cache"))) == first["cache_misses"]
    assert jax.config.jax_compilation_cache_dir is None
    second = start(make(steps=2, evaluation__prompts=0))
    assert second["cache_hits"] == second["compile_requests_use_cache"] > 10 and not second["cache_misses"]


def test_what_the_user_has_configured_stays(tmp_path):
    before = [getattr(jax.config, name) for name in NAMES]
    assert before[0]
    with compile_cache(tmp_path / "mine"):
        assert [getattr(jax.config, name) for name in NAMES] == before
    assert not (tmp_path / "mine").exists()


def test_the_settings_come_back(nothing_configured, tmp_path):
    before = [getattr(jax.config, name) for name in NAMES]
    with pytest.raises(KeyError), compile_cache(tmp_path / "mine"):
        jax.jit(lambda x: 3 * x + 1)(1.0).block_until_ready()
        raise KeyError
    assert [getattr(jax.config, name) for name in NAMES] == before
    assert list((tmp_path / "mine").glob("*-cache"))
    jax.jit(lambda x: 5 * x + 1)(1.0).block_until_ready()
    assert len(list((tmp_path / "mine").glob("*-cache"))) == 1


def test_a_folder_with_nothing_but_compiled_programs_is_a_new_run(make, tmp_path):
    (tmp_path / "run" / "compile_cache").mkdir(parents=True)
    with training._run.RunFolder(tmp_path / "run", make()) as folder:
        assert not folder.resumed
