"""Compiled programs on disk, so that a run that goes on does not compile again."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compile_cache(folder: Path) -> Iterator[None]:
    """JAX's persistent compilation cache in `folder`, unless the user has named another.

    Another is named by JAX_COMPILATION_CACHE_DIR or the config value `jax_compilation_cache_dir`;
    JAX_ENABLE_COMPILATION_CACHE=false turns it off. Programs that compile fast are kept, too: a run has a
    hundred of them, and reading one takes a hundredth of the time. Of many processes the first writes.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    before = {name: getattr(jax.config, name) for name in _SETTINGS}
    try:
        for name, value in (_SETTINGS | {"jax_compilation_cache_dir": str(folder.absolute())}).items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it holds on to the folder that it first was given
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


_SETTINGS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
