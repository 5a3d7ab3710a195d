"""The losses under a mesh whose axes are Explicit: rows of the batch over `data`, nothing else said."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import losses

B, T, V, D = 4, 6, 20, 8
LOSSES = {
    "reverse_kl": lambda a: losses.reverse_kl(a["student"], a["teacher"]),
    "jsd": lambda a: losses.jsd(a["student"], a["teacher"], beta=0.3),
    "top_k": lambda a: losses.top_k(losses.reverse_kl, a["student"], a["teacher"], k=4),
    "entropy_aware_kl": lambda a: losses.entropy_aware_kl(a["student"], a["teacher"], threshold=1.0),
    "sampled_reverse_kl": lambda a: losses.sampled_reverse_kl(a["tokens"], a["theirs"], a["rollout"]),
    "sampled_tail": lambda a: losses.sampled_tail_reverse_kl(a["student"], a["teacher"], a["ids"], k=4),
    "policy_gradient": lambda a: losses.policy_gradient(a["tokens"], a["rollout"], a["theirs"]),
    "fused": lambda a: losses.fused(
        losses.reverse_kl,
        a["hidden"],
        losses.Unembedding(a["kernel"]),
        a["hidden"] * 2,
        losses.Unembedding(a["kernel"]),
        chunk=5,
    ),
}


@functools.cache
def arrays() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    distribution = {
        n: jax.nn.log_softmax(rng.normal(size=(B, T, V)).astype("f4")) for n in ("student", "teacher")
    }
    sampled = {n: -rng.uniform(0.1, 3, (B, T)).astype("f4") for n in ("tokens", "theirs", "rollout")}
    return (
        distribution
        | sampled
        | dict(
            ids=rng.integers(0, V, (B, T), dtype=np.int32),
            hidden=rng.normal(size=(B, T, D)).astype("f4"),
            kernel=rng.normal(size=(D, V)).astype("f4"),
        )
    )


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_without_a_mesh(name):
    def total(floats, rest):
        return jnp.sum(LOSSES[name](floats | rest))

    given = arrays()
    rest = {"ids": given["ids"]}
    floats = {key: value for key, value in given.items() if key != "ids"}
    want = jax.value_and_grad(total)(floats, rest)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        placed = {k: jax.device_put(v, whole if k == "kernel" else rows) for k, v in given.items()}
        rest = {"ids": placed.pop("ids")}
        got = jax.jit(jax.value_and_grad(total))(placed, rest)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(np.asarray(b), np.asarray(a), rtol=2e-5, atol=2e-6)
