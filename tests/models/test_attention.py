import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models import _attention


def inputs(batch, length, heads, kv_heads, width):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def test_attend_is_softmax_of_visible_scores():
    q, k, v = inputs(2, 5, 4, 2, 6)
    mask = jnp.array([[1, 1, 1, 0, 1], [1, 0, 1, 1, 1]], bool)
    ours = _attention.attend(q, k, v, causal=True, mask=mask)
    for b, t, n in np.ndindex(2, 5, 4):
        seen = [s for s in range(t + 1) if mask[b, s]]
        scores = np.array([q[b, t, n] @ k[b, s, n // 2] for s in seen]) / np.sqrt(6)
        weights = np.exp(scores) / np.exp(scores).sum()
        expected = sum(w * v[b, s, n // 2] for w, s in zip(weights, seen, strict=True))
        np.testing.assert_allclose(ours[b, t, n], expected, atol=1e-5)


def test_cache_mask():
    valid = jnp.array([[1, 0, 1, 1, 1, 1]], bool)
    mask = _attention.cache_mask(jnp.int32(3), 2, 6, valid, 1)
    expected = [[[1, 0, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0]]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def test_splash_computes_the_same_as_xla():
    """The kernel interpreted on CPU; hidden queries may differ, nothing reads them."""
    q, k, v = inputs(2, 128, 4, 2, 64)
    mask = jnp.arange(128) < jnp.array([[128], [70]])
    ours = _attention._splash_local(q, k, v, mask, interpret=True)
    expected = _attention.attend(q, k, v, causal=True, mask=mask, implementation="xla")
    np.testing.assert_allclose(ours[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(ours[1, :70], expected[1, :70], atol=1e-5)


def test_splash_refuses_a_length_it_cannot_split():
    q, k, v = inputs(1, 100, 2, 2, 64)
    with pytest.raises(ValueError, match="multiple of 128; it is 100"):
        _attention._splash(q, k, v, None)


@pytest.mark.tpu
def test_splash_compiles_for_a_tpu_mesh():
    """In its own process: libtpu takes a lock and reads the environment when it is loaded."""
    pytest.importorskip("libtpu")
    program = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from opd_jax.models import _attention
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
axes = ("data", "fsdp", "tensor")
mesh = Mesh(np.array(devices).reshape(1, 4, 2), axes, axis_types=(AxisType.Auto,) * 3)
sharding = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
q, k = (jax.ShapeDtypeStruct((8, 512, n, 64), jnp.bfloat16, sharding=sharding) for n in (8, 4))
def loss(q, k, v):
    out = _attention.attend(q, k, v, causal=True, implementation="splash")
    return out.astype(jnp.float32).sum()
with jax.set_mesh(mesh):
    lowered = jax.jit(jax.grad(loss)).trace(q, k, k).lower(lowering_platforms=("tpu",))
    text = lowered.compile().as_text()
assert "tpu_custom_call" in text and "all-gather" not in text
"""
    root = str(Path(_attention.__file__).parents[2])
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join([root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
