"""A model spread over eight devices computes what it computes on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from opd_jax import models, parallel

CONFIG = models.DecoderConfig(
    vocab_size=40,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,
    ff_width=24,
    qk_norm=True,
    attention_bias=True,
    output_bias=True,
    architecture="Qwen3ForCausalLM",
)


@pytest.fixture
def mesh():
    if jax.device_count() != 8:
        pytest.skip("needs the eight devices of tests/conftest.py")
    return parallel.make_mesh(2, -1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_a_sharded_model_is_the_model(mesh, dtype, tolerance, tmp_path):
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (8, 6)), jnp.int32)
    model = models.Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=dtype)
    models.save(model, tmp_path / "model")
    loaded = models.load(tmp_path / "model", mesh=mesh)
    check_shardings(loaded, model, mesh)
    check_same_results(model, loaded, tokens, mesh, tolerance)
    # Saving gathers what is spread, without a difference.
    models.save(loaded, tmp_path / "again")
    one, two = ((tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert one.read_bytes() == two.read_bytes()


def check_shardings(loaded, model, mesh):
    specs = {
        "embedding": P("tensor", "fsdp"),
        "head.kernel": P("fsdp", "tensor"),
        "norm.scale": P(None),
        "layers.attention.q.kernel": P(None, "fsdp", "tensor"),
        "layers.attention.k.bias": P(None, "tensor"),
        "layers.attention.q_norm.scale": P(None, None),
        "layers.attention.o.kernel": P(None, "tensor", "fsdp"),
        "layers.mlp.down.kernel": P(None, "tensor", "fsdp"),
    }
    flat = {".".join(p): leaf for p, leaf in nnx.to_flat_state(nnx.state(loaded, nnx.Param))}
    for name, spec in specs.items():
        assert flat[name].sharding.spec == spec, (name, flat[name].sharding.spec)
    for name, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        np.testing.assert_array_equal(leaf.get_value(), flat[".".join(name)].get_value())
    params = nnx.state(model, nnx.Param)
    shardings = parallel.param_shardings(params, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(params)
    placed = jax.device_put(params, shardings)
    assert placed.embedding.sharding.spec == P("tensor", "fsdp")


def check_same_results(model, loaded, tokens, mesh, tolerance):
    def run(model, tokens):
        graphdef, params = nnx.split(model, nnx.Param)

        @jax.jit
        def step(params, tokens):
            def loss(params):
                logits = nnx.merge(graphdef, params).logits(tokens)
                return jax.nn.log_softmax(logits)[..., 1].mean(), logits

            return jax.value_and_grad(loss, has_aux=True)(params)

        (_, logits), gradient = step(params, tokens)
        if loaded.embedding.dtype != jnp.float32:
            return logits, gradient
        call = jax.jit(lambda m, t, c, prefill: m(t, None, c, prefill=prefill), static_argnums=3)
        first, cache = call(model, tokens[:, :4], model.init_cache(8, 8), True)
        last, _ = call(model, tokens[:, 4:], cache, False)
        return logits, gradient, jnp.concatenate([first, last], axis=1)

    one = run(model, tokens)
    many = run(loaded, jax.device_put(tokens, parallel.batch_sharding(mesh)))
    assert many[1].layers.mlp.down.kernel.sharding.spec == P(None, "tensor", "fsdp")
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance, rtol=tolerance
        )
