"""The platform that programs are traced for: what is here, unless a plan is made for another."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_TARGET: ContextVar[str | None] = ContextVar("target", default=None)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of `compiling_for`, or else JAX's default backend."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Traces as on the platform `name`, to compile ahead of time; forgets what was traced for it."""
    other = name != platform()
    token = _TARGET.set(name)
    try:
        if other:  # a cached trace does not know for which platform it was made
            jax.clear_caches()
        yield
    finally:
        _TARGET.reset(token)
        if other:
            jax.clear_caches()
