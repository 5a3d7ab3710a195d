import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opd_jax import models
from opd_jax.models import _layers


def logits(model, tokens, *args, **kwargs):
    return model(tokens, *args, **kwargs)[0]


def test_later_tokens_do_not_change_earlier_logits(tiny, tokens):
    changed = tokens.at[:, 8:].set(7)
    np.testing.assert_array_equal(tiny.logits(tokens)[:, :8], tiny.logits(changed)[:, :8])


def test_mask_without_cache_hides_left_padding(tiny, tokens):
    padded = jnp.concatenate([jnp.zeros((2, 3), jnp.int32), tokens], axis=1)
    mask = jnp.arange(15) >= 3
    positions = jnp.broadcast_to(jnp.maximum(jnp.arange(15) - 3, 0), (2, 15))
    ours = logits(tiny, padded, positions, None, jnp.broadcast_to(mask, (2, 15)))
    np.testing.assert_allclose(ours[:, 3:], tiny.logits(tokens), atol=1e-5)


def test_decode_after_a_hole_equals_the_packed_row(tiny, tokens):
    """The layout of rollouts: prompt right padded to P, completions from slot P on."""
    lengths, bucket, slots = np.array([5, 8]), 8, 16
    step = jax.jit(lambda model, *call: model(*call))
    prompts = jnp.where(jnp.arange(bucket) < lengths[:, None], tokens[:, :bucket], 0)
    cache = tiny.init_cache(2, slots)
    _, cache = jax.jit(lambda m, t, c: m(t, None, c, prefill=True))(tiny, prompts, cache)
    slot = jnp.arange(slots)
    valid = (slot < lengths[:, None]) | (slot >= bucket)
    packed = np.zeros((2, 12), np.int32)
    for row, length in enumerate(lengths):
        packed[row, : length + 4] = np.concatenate([tokens[row, :length], tokens[row, 8:]])
    whole = jax.jit(lambda m, t: m.logits(t))(tiny, packed)
    for t in range(4):
        positions = jnp.asarray(lengths + t)[:, None]
        out, cache = step(tiny, tokens[:, 8 + t : 9 + t], positions, cache, valid)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(out[row, 0], whole[row, length + t], atol=1e-5)


@pytest.mark.parametrize(("dtype", "batch"), [(jnp.float32, 2), (jnp.bfloat16, 8), (jnp.bfloat16, 32)])
def test_prefill_decode_and_gradient_run(tiny, batch, dtype):
    """bfloat16 products of some forms compile on CPU and then fail, from batch 8 on."""
    model = models.Decoder(tiny.config, rngs=nnx.Rngs(0), dtype=dtype)
    tokens = jnp.ones((batch, 6), jnp.int32)
    cache = model.init_cache(batch, 8)
    run = jax.jit(lambda m, t, c, prefill: m(t, None, c, prefill=prefill), static_argnums=3)
    first, cache = run(model, tokens[:, :5], cache, True)
    last, cache = run(model, tokens[:, 5:], cache, False)

    @jax.jit
    def train(params):
        def total(params):
            logits = nnx.merge(graphdef, params).logits(tokens)
            return logits.sum(), logits

        return jax.grad(total, has_aux=True)(params)

    graphdef, params = nnx.split(model, nnx.Param)
    gradient, full = train(params)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), full, atol=tolerance)
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == dtype
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_cache_of_a_bfloat16_model_on_cpu_is_float32(tiny):
    model = models.Decoder(tiny.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    on_cpu = jax.default_backend() == "cpu"
    assert model.init_cache(1, 4).k.dtype == (jnp.float32 if on_cpu else jnp.bfloat16)
    assert model.init_cache(1, 4, jnp.bfloat16).k.dtype == jnp.bfloat16


@pytest.mark.slow
def test_remat_changes_nothing_but_memory(tiny, tokens):
    def gradient(remat):
        model = models.Decoder(tiny.config, rngs=nnx.Rngs(0), remat=remat)
        graphdef, params = nnx.split(model, nnx.Param)
        loss = lambda p: jax.nn.logsumexp(nnx.merge(graphdef, p).logits(tokens)).sum()  # noqa: E731
        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params))
        return jax.jit(jax.grad(loss))(params), ("checkpoint" in jaxpr or "remat" in jaxpr)

    (plain, without), (recomputed, with_remat) = gradient("none"), gradient("block")
    assert with_remat and not without
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, recomputed)


def test_remat_that_cannot_be(tiny):
    for remat, message in (
        ("offload", "offload, but on a CPU"),
        (True, "remat is True; known: none, block, off"),
    ):
        with pytest.raises(ValueError, match=message):
            models.Decoder(tiny.config, rngs=nnx.Rngs(0), remat=remat)


@pytest.mark.slow
def test_bfloat16_gradient_is_close_to_float32(tiny, tokens):
    def gradient(dtype):
        model = models.Decoder(tiny.config, rngs=nnx.Rngs(0), dtype=jnp.float32)
        graphdef, params = nnx.split(model, nnx.Param)

        def loss(p):
            cast = jax.tree.map(lambda x: x.astype(dtype), p)
            out = jax.nn.log_softmax(nnx.merge(graphdef, cast).logits(tokens))
            return -out[..., 5].mean()

        return jax.jit(jax.grad(loss))(params)

    exact, rounded = gradient(jnp.float32), gradient(jnp.bfloat16)
    flat = lambda tree: jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])  # noqa: E731
    difference = jnp.linalg.norm(flat(exact) - flat(rounded)) / jnp.linalg.norm(flat(exact))
    assert difference < 0.02


@pytest.mark.parametrize("vocab", [40, 1000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lookup_and_its_gradient(vocab, dtype):
    embedding = jax.random.normal(jax.random.key(0), (vocab, 8), dtype)
    tokens = jnp.array([[3] * 999 + [vocab - 1]])  # One token so often that bfloat16 stops counting.
    rows, pull = jax.vjp(lambda e: _layers.lookup(e, tokens), embedding)
    np.testing.assert_array_equal(rows, embedding[tokens])
    (gradient,) = pull(jnp.ones_like(rows))
    assert gradient.dtype == dtype
    expected = np.zeros((vocab, 8))
    expected[3], expected[-1] = 999, 1
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected, rtol=2e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_narrow_product_has_the_gradient_of_the_wide_one(transposed):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (3, 5, 16))
    kernel = jax.random.normal(keys[1], (12, 16) if transposed else (16, 12))
    pull_from = jax.random.normal(keys[2], (3, 5, 12))

    def gradients(dtype):
        def total(x, kernel):
            return (_layers.project(x, kernel, transposed) * pull_from).sum()

        return jax.jit(jax.grad(total, (0, 1)))(x.astype(dtype), kernel.astype(dtype))

    for exact, rounded in zip(gradients(jnp.float32), gradients(jnp.bfloat16), strict=True):
        assert rounded.dtype == jnp.bfloat16
        error = jnp.linalg.norm((exact - rounded).ravel()) / jnp.linalg.norm(exact.ravel())
        assert error < 0.01


def test_compile_size_does_not_grow_with_depth(tiny, tokens):
    import dataclasses

    def size(layers):
        config = dataclasses.replace(tiny.config, layers=layers)
        model = models.abstract(config)
        return len(str(jax.make_jaxpr(lambda m, t: m.logits(t))(model, tokens)))

    assert size(12) < size(3) * 1.05


def test_graphdef_is_hashable_and_equal_for_equal_models(tiny):
    same = models.Decoder(tiny.config, rngs=nnx.Rngs(1))
    assert hash(nnx.graphdef(tiny)) == hash(nnx.graphdef(same))
    assert nnx.graphdef(tiny) == nnx.graphdef(same)


def test_layers_differ_and_are_stacked(tiny):
    kernel = tiny.layers.attention.q.kernel[...]
    assert kernel.shape == (3, 16, 32)
    assert not np.array_equal(kernel[0], kernel[1])


def test_abstract_allocates_nothing(tiny):
    import dataclasses

    config = dataclasses.replace(tiny.config, vocab_size=10**9, width=2**14)
    model = models.abstract(config, jnp.bfloat16)
    assert model.embedding.shape == (10**9, 2**14)
    assert model.embedding.dtype == jnp.bfloat16


def test_too_many_tokens_for_the_cache(tiny, tokens):
    with pytest.raises(ValueError, match="12 tokens do not fit a cache of 8 slots"):
        tiny(tokens, None, tiny.init_cache(2, 8), prefill=True)


@pytest.mark.parametrize("attention", ["cudnn", "splash"])
def test_attention_the_backend_lacks_is_refused(tiny, attention):
    if jax.default_backend() != "cpu":
        pytest.skip("the backend may have it")
    with pytest.raises(ValueError, match=f"attention='{attention}' needs a .PU.*'cpu'"):
        models.Decoder(tiny.config, rngs=nnx.Rngs(0), attention=attention)


def test_unknown_attention_is_refused(tiny):
    with pytest.raises(ValueError, match=re.escape("'flash'; it must be one of auto, xla")):
        models.Decoder(tiny.config, rngs=nnx.Rngs(0), attention="flash")


def test_xla_attention_equals_auto(tiny, tokens):
    model = models.Decoder(tiny.config, rngs=nnx.Rngs(0), attention="xla")
    np.testing.assert_array_equal(model.logits(tokens), tiny.logits(tokens))
