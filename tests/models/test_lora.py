"""Low-rank adapters: against the closed form, and where a model may go."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from opd_jax import models, parallel
from opd_jax.models._layers import Linear
from opd_jax.models._lora import LoRA

from .conftest import GOLDENS

pytestmark = pytest.mark.usefixtures("quick_compilation")

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
KERNELS = {"q": "attention", "k": "attention", "v": "attention", "o": "attention"}


@pytest.fixture
def tokens():
    """Batch 8: from there on, bfloat16 products of some forms compile on CPU and then fail."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 40, (8, 6)), jnp.int32)


def linear(model, name):
    return getattr(getattr(model.layers, KERNELS.get(name, "mlp")), name)


def adapt(model, *, b=0.3, **options):
    """Adapters whose B is not zero."""
    options = dict(rank=3, alpha=6.0, targets=LINEAR, key=jax.random.key(0)) | options
    adapted = models.add_lora(model, **options)
    rng = np.random.default_rng(1)
    for path, leaf in nnx.to_flat_state(nnx.state(adapted, models.LoRAParam)):
        if path[-1] == "lora_b":
            leaf.set_value(
                jax.device_put(jnp.asarray(rng.normal(0, b, leaf.shape), leaf.dtype), leaf.sharding)
            )
    return adapted


def split(model):
    return nnx.split(model, models.LoRAParam, ...)


@jax.jit
def logits(model, tokens):
    return model.logits(tokens)


@jax.jit
def step(model, *call):
    return model(*call)


@jax.jit
def prefill(model, *call):
    return model(*call, prefill=True)


@jax.jit(static_argnums=0)
def value_and_grad(graphdef, trained, frozen, tokens):
    """((loss, logits), gradient in what is trained)."""

    def loss(trained):
        logits = nnx.merge(graphdef, trained, frozen).logits(tokens)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1).mean(), logits

    return jax.value_and_grad(loss, has_aux=True)(trained)


def by_hand(model):
    """A plain copy whose kernels are W + alpha / rank * A B, computed by numpy in float64."""
    plain = models.merge_lora(model)
    for name in LINEAR:
        ours = linear(model, name)
        if ours.adapter is None:
            continue
        w, a, b = (
            np.asarray(x[...], np.float64) for x in (ours.kernel, ours.adapter.lora_a, ours.adapter.lora_b)
        )
        kernel = w + ours.adapter.alpha / a.shape[-1] * np.einsum("lir,lro->lio", a, b)
        linear(plain, name).kernel.set_value(jnp.asarray(kernel, ours.kernel.dtype))
    return plain


def test_new_adapters_change_nothing(tiny, tokens):
    adapted = models.add_lora(tiny, rank=3, alpha=6, key=jax.random.key(0))
    np.testing.assert_allclose(logits(adapted, tokens), logits(tiny, tokens), atol=1e-6)
    for name in LINEAR:
        a, b = linear(adapted, name).adapter.lora_a, linear(adapted, name).adapter.lora_b
        layers, into, out = linear(tiny, name).kernel.shape
        assert a.shape == (layers, into, 3) and b.shape == (layers, 3, out)
        assert not np.any(b[...])
        assert 0.9 < np.abs(a[...]).max() * math.sqrt(into) <= 1  # uniform, as in PEFT
        assert abs(float(a[...].std()) * math.sqrt(3 * into) - 1) < 0.15
        assert linear(tiny, name).adapter is None
    # Layers and modules have random numbers of their own, and a module's depend on nothing else.
    q = models.add_lora(tiny, rank=3, alpha=6, targets=("q",), key=jax.random.key(0))
    a = linear(adapted, "q").adapter.lora_a[...]
    np.testing.assert_array_equal(linear(q, "q").adapter.lora_a[...], a)
    assert np.abs(a[0] - a[1]).max() > 0 and np.abs(a - linear(adapted, "gate").adapter.lora_a[...]).max() > 0


def test_adapters_are_the_only_trained_parameters(tiny):
    adapted = models.add_lora(tiny, rank=2, alpha=8, targets=("q", "down"), key=jax.random.key(0))
    _, trained, frozen = split(adapted)
    names = [".".join(path) for path, _ in nnx.to_flat_state(trained)]
    assert names == [f"layers.{m}.adapter.lora_{x}" for m in ("attention.q", "mlp.down") for x in ("a", "b")]
    assert all(isinstance(leaf, models.LoRAParam) for _, leaf in nnx.to_flat_state(trained))
    plain = nnx.state(tiny)
    assert jax.tree.structure(frozen) == jax.tree.structure(plain)
    for ours, base in zip(jax.tree.leaves(frozen), jax.tree.leaves(plain), strict=True):
        assert ours is base  # shared, not copied


def test_delta_is_that_of_the_closed_form(tiny, tokens):
    adapted = adapt(tiny)
    ours = logits(adapted, tokens)
    assert np.abs(ours - logits(tiny, tokens)).max() > 0.1
    np.testing.assert_allclose(ours, logits(by_hand(adapted), tokens), atol=1e-5)


def test_merged_is_the_plain_decoder(tiny, tokens):
    adapted = adapt(tiny)
    merged = models.merge_lora(adapted)
    assert nnx.graphdef(merged) == nnx.graphdef(tiny)
    assert jax.tree.structure(merged) == jax.tree.structure(tiny)
    np.testing.assert_allclose(logits(merged, tokens), logits(adapted, tokens), atol=1e-5)
    for name in LINEAR:
        a, b = (np.asarray(linear(model, name).kernel[...]) for model in (merged, by_hand(adapted)))
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert merged.layers.attention_norm.scale[...] is tiny.layers.attention_norm.scale[...]  # shared
    assert linear(adapted, "q").adapter is not None  # not changed itself
    assert models.merge_lora(tiny) is tiny


def test_first_gradient_reaches_b_alone(tiny, tokens):
    """d loss / dA = x^T (g B^T) is zero with B, d loss / dB = (x A)^T g is not."""
    adapted = models.add_lora(tiny, rank=3, alpha=6, key=jax.random.key(0))
    _, gradient = value_and_grad(*split(adapted), tokens)
    for path, leaf in nnx.to_flat_state(gradient):
        largest = np.abs(leaf.get_value()).max(axis=(1, 2))
        assert np.all(largest == 0) if path[-1] == "lora_a" else np.all(largest > 0), path


def test_gradient_is_that_of_the_merged_kernel(tiny, tokens):
    """With W' = W + s A B and G = d loss / dW': d loss / dA = s G B^T, d loss / dB = s A^T G."""
    adapted = adapt(tiny)
    _, ours = value_and_grad(*split(adapted), tokens)
    graphdef, params = nnx.split(by_hand(adapted))
    _, whole = value_and_grad(graphdef, params, nnx.State({}), tokens)
    for name in LINEAR:
        adapter = linear(adapted, name).adapter
        a, b = (np.asarray(x[...], np.float64) for x in (adapter.lora_a, adapter.lora_b))
        g = np.asarray(linear(whole, name).kernel[...], np.float64)
        got = linear(ours, name).adapter
        np.testing.assert_allclose(got.lora_a[...], 2 * g @ b.swapaxes(1, 2), atol=1e-6, rtol=1e-4)
        np.testing.assert_allclose(got.lora_b[...], 2 * a.swapaxes(1, 2) @ g, atol=1e-6, rtol=1e-4)


def test_remat_has_the_same_gradient(tiny, tokens):
    adapted = adapt(tiny)
    (loss, _), gradient = value_and_grad(*split(adapted), tokens)
    plain = models.Decoder(tiny.config, rngs=nnx.Rngs(0), remat="block")
    (again, _), recomputed = value_and_grad(*split(adapt(plain)), tokens)
    np.testing.assert_allclose(loss, again, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)


def test_descent_on_the_adapters_lowers_the_loss(tiny, tokens):
    graphdef, trained, frozen = split(models.add_lora(tiny, rank=3, alpha=6, key=jax.random.key(0)))
    losses = []
    for _ in range(30):
        (loss, _), gradient = value_and_grad(graphdef, trained, frozen, tokens)
        trained = jax.tree.map(lambda p, g: p - 3.0 * g, trained, gradient)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    assert np.abs(jax.tree.leaves(trained.layers.mlp.up)[1]).max() > 0


def test_cached_decode_is_the_full_pass(tiny, tokens):
    adapted = adapt(tiny)
    cache = adapted.init_cache(8, 8)
    out, cache = prefill(adapted, tokens[:, :3], None, cache)
    parts = [out]
    for t in range(3, tokens.shape[1]):
        out, cache = step(adapted, tokens[:, t : t + 1], None, cache)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, 1), logits(adapted, tokens), atol=1e-5)


def test_tied_embeddings_stay():
    base = models.load(GOLDENS / "qwen3_tied", dtype="float32")
    merged = models.merge_lora(adapt(base, targets=("q",)))
    assert base.head is None and merged.embedding[...] is base.embedding[...]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_base(tiny, tokens, dtype):
    base = models.Decoder(tiny.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    adapted = adapt(base, dtype=dtype)
    wide = [jax.tree.map(lambda p: p.astype(jnp.float32), state) for state in split(adapted)[1:]]
    ((_, ours), gradient) = value_and_grad(*split(adapted), tokens)
    ((_, theirs), true_gradient) = value_and_grad(nnx.graphdef(adapted), *wide, tokens)
    assert ours.dtype == jnp.float32
    assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(true_gradient), strict=True):
        assert a.dtype == dtype
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < 0.05 * np.linalg.norm(b)
    merged = models.merge_lora(adapted)
    assert linear(merged, "q").kernel.dtype == jnp.bfloat16
    ours, theirs = (np.asarray(linear(m, "q").kernel[...], np.float32) for m in (merged, by_hand(adapted)))
    np.testing.assert_allclose(ours, theirs, rtol=2**-8)  # one rounding
    assert (ours == theirs).mean() > 0.999


def test_bfloat16_rounds_the_sum_and_not_its_parts():
    """1.003 + 0.003 is 1.0078 in bfloat16; each part rounded first, it would stay 1."""
    linear = Linear(("embed", "mlp"), (2, 1), False, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    linear.kernel.set_value(jnp.asarray([[1.0], [0.003]], jnp.bfloat16))
    x = jnp.ones((1, 2), jnp.bfloat16)
    assert linear(x) == 1
    linear.adapter = LoRA(jnp.full((2, 1), 0.5), jnp.full((1, 1), 0.001), ("embed", "mlp"), alpha=3.0)
    np.testing.assert_allclose(linear.adapter(x), 0.003, rtol=1e-6)
    assert linear(x) == 1.0078125


# Which modules.


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("q", "mlp.up"), {"q", "up"}),
        (["layers.attention.o", "o"], {"o"}),
        ("attention\\..", {"q", "k", "v", "o"}),
        ("q|down", {"q", "down"}),
        (".*", set(LINEAR)),
    ],
)
def test_targets(tiny, targets, names):
    adapted = models.add_lora(tiny, rank=1, alpha=1, targets=targets, key=jax.random.key(0))
    assert {name for name in LINEAR if linear(adapted, name).adapter is not None} == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(targets=("q", "q_proj")), r"'q_proj' matches no module; there are attention\.k, .*mlp\.up"),
        (dict(targets="att"), "'att' matches no module; there are"),
        (dict(targets="("), "no regular expression"),
        (dict(targets=()), r"targets is empty; name modules: attention\.k"),
        (dict(targets=("q", "head")), r"head cannot have an adapter: the losses take its matrix"),
        (dict(targets="embed.*"), r"embedding cannot have an adapter: its rows are looked up"),
        (dict(targets=("q_norm",)), "'q_norm' matches no module"),
        (dict(rank=0), "rank is 0; it must be a positive integer"),
        (dict(rank=2.0), r"rank is 2\.0; it must be a positive integer"),
        (dict(rank=17), r"rank is 17, but attention\.k is a matrix of \[16, 16\]: it can be at most 16"),
        (dict(alpha=0.0), "alpha is 0"),
        (dict(alpha=math.nan), "alpha is nan"),
        (dict(dtype=jnp.float16), "dtype is float16; it must be float32 or bfloat16"),
    ],
)
def test_what_add_lora_refuses(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        models.add_lora(tiny, **dict(rank=2, alpha=4, key=jax.random.key(0)) | options)


def test_adapters_twice_are_refused(tiny):
    once = models.add_lora(tiny, rank=2, alpha=4, targets=("q",), key=jax.random.key(0))
    with pytest.raises(ValueError, match="adapters already; merge them first"):
        models.add_lora(once, rank=2, alpha=4, targets=("k",), key=jax.random.key(0))


def test_abstract_models_and_traces(tiny):
    options = dict(rank=2, alpha=4, key=jax.random.key(0))
    shapes = models.add_lora(models.abstract(tiny.config), **options)
    real = models.add_lora(tiny, **options)
    assert jax.tree.map(lambda x: x.shape, nnx.state(shapes)) == jax.tree.map(
        lambda x: x.shape, nnx.state(real)
    )
    traced = nnx.eval_shape(lambda: models.merge_lora(models.add_lora(tiny, **options)))
    assert jax.tree.structure(traced) == jax.tree.structure(tiny)


# On eight devices.


@pytest.mark.slow
def test_sharded_over_eight_devices(tiny, tokens, tmp_path):
    if jax.device_count() != 8:
        pytest.skip("needs the eight devices of tests/conftest.py")
    mesh = parallel.make_mesh(2, 2, 2)
    graphdef, params = nnx.split(tiny)
    spread = nnx.merge(graphdef, jax.device_put(params, parallel.param_shardings(params, mesh)))
    adapted, many = adapt(tiny), adapt(spread)
    specs = {"q": ("fsdp", "tensor"), "k": ("fsdp", "tensor"), "down": ("tensor", "fsdp")}
    for name, (into, out) in specs.items():
        adapter = linear(many, name).adapter
        assert adapter.lora_a.sharding.spec == P(None, into, None)
        assert adapter.lora_b.sharding.spec == P(None, None, out)
    # The same as what the metadata says, so that checkpoints and optimisers lay them out alike.
    state = nnx.state(many, models.LoRAParam)
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(parallel.param_shardings(state, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    rows = jax.device_put(tokens, parallel.batch_sharding(mesh))
    one, eight = value_and_grad(*split(adapted), tokens), value_and_grad(*split(many), rows)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
    merged = models.merge_lora(many)
    for ours, base in zip(jax.tree.leaves(merged), jax.tree.leaves(spread), strict=True):
        assert ours.sharding == base.sharding
    np.testing.assert_allclose(linear(merged, "o").kernel, linear(by_hand(adapted), "o").kernel, atol=1e-6)
    models.save_lora(many, tmp_path / "adapter")
    again = models.load_lora(spread, tmp_path / "adapter")
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(again), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)
