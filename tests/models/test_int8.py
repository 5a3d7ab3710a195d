"""Weight-only int8: against numpy's own rounding, the dequantised model, and the model as it was."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import PartitionSpec as P

import opd_jax
from opd_jax import models, parallel, rollout, tasks
from opd_jax.models import _int8
from opd_jax.models._layers import lookup_int8

from .conftest import GOLDENS

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEMO = Path(opd_jax.__file__).parent / "demo" / "teacher"


def flat(model) -> dict:
    return {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


def widened(model):
    """The same weights, computing in float32."""
    graphdef, params = nnx.split(model)
    wide = jax.tree.map(lambda a: a if a.dtype == jnp.int8 else a.astype(jnp.float32), params)
    return nnx.merge(graphdef, wide)


def dequantised(model):
    """The float32 model with the weights q s."""
    values = flat(model)
    plain = models.abstract(model.config, jnp.float32)
    graphdef, params = nnx.split(plain)

    def value(path):
        q, scale = values[path].astype(jnp.float32), values.get(f"{path}_scale")
        if scale is None:
            return q
        return q * jnp.expand_dims(scale, -1 if path == "embedding" else -2)

    filled = [(path, leaf.replace(value(".".join(path)))) for path, leaf in nnx.to_flat_state(params)]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def stored(folder) -> dict[str, np.ndarray]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return {name: a.astype(np.float64) for name, a in tensors.items()}


@pytest.mark.parametrize(
    "folder", [GOLDENS / "qwen2_untied", GOLDENS / "qwen3_tied", DEMO], ids=lambda f: f.name
)
@pytest.mark.parametrize("piece", [2**26, 100])
def test_weights_are_rounded_to_the_nearest_of_their_channel(folder, piece, monkeypatch):
    """A checkpoint's rows are output channels; the small pieces are single rows of embedding and head."""
    monkeypatch.setattr(_int8, "_PIECE", piece)
    values, seen = flat(models.load(folder, dtype="int8")), 0
    hf = dict(q="self_attn.q_proj", o="self_attn.o_proj", down="mlp.down_proj")
    names = {"embedding": ["model.embed_tokens.weight"], "head.kernel": ["lm_head.weight"]}
    for ours in ("attention.q", "attention.o", "mlp.down"):
        inner = hf[ours.rpartition(".")[2]]
        layers = range(len(values["layers.mlp_norm.scale"]))
        names[f"layers.{ours}.kernel"] = [f"model.layers.{i}.{inner}.weight" for i in layers]
    tensors = stored(folder)
    for ours, theirs in names.items():
        if ours not in values:
            continue
        assert values[ours].dtype == jnp.int8 and values[f"{ours}_scale"].dtype == jnp.float32
        stacked = np.asarray(values[ours]), np.asarray(values[f"{ours}_scale"])
        stacked = stacked if ours.startswith("layers") else (a[None] for a in stacked)
        for name, q, scale in zip(theirs, *stacked, strict=True):
            weights, q = tensors[name], q if ours == "embedding" else q.T
            absmax = np.abs(weights).max(1)
            np.testing.assert_allclose(scale, absmax / 127, rtol=2e-7)  # one rounding to float32
            scale = scale.astype(np.float64)[:, None]
            # The quotient is rounded to float32 before it is to a whole number: 127 * 2^-24 at most.
            assert (np.abs(weights - q * scale) <= scale * (0.5 + 127 * 2.0**-24)).all(), name
            assert (np.abs(q).max(1)[absmax > 0] == 127).all()
            seen += 1
    assert seen >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_untied", "qwen3_tied", "llama_bias"])
def test_the_scale_after_the_product_is_the_scale_of_the_weights(name):
    model = models.load(GOLDENS / name, dtype="int8")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 9)), jnp.int32)
    want = dequantised(model).logits(tokens)
    np.testing.assert_allclose(widened(model).logits(tokens), want, rtol=1e-5, atol=1e-5)


def test_rows_are_looked_up():
    """Above 512 tokens they are gathered, below they are a product with one-hot rows."""
    rng = np.random.default_rng(0)
    for size in (600, 40):
        weights = rng.normal(size=(size, 16)).astype(np.float32)
        q, scale = _int8.quantise(jnp.asarray(weights), -1)
        tokens = jnp.asarray([[3, size - 1, 0, 22]])
        got = lookup_int8(q, scale, tokens, jnp.float32)
        want = (np.asarray(q, np.float32) * np.asarray(scale)[:, None])[np.asarray(tokens)]
        np.testing.assert_array_equal(got, want)


def test_the_demo_teacher_says_what_it_said():
    """KL from the float32 teacher over its own completions: 1.5e-5 nats a token was measured (bfloat16:
    0.7e-5), the KL being quadratic in errors of rounding that other chips add up in another order: three
    times that."""
    exact, narrow = models.load(DEMO), models.load(DEMO, dtype="int8")
    tokenizer = models.load_tokenizer(DEMO)
    task = tasks.load("arithmetic", options=dict(seed=5, size=128))
    prompts = tasks.Prompts(task, tokenizer, batch_size=128, max_prompt_length=32)[0]
    said = rollout.generate(
        exact, prompts.tokens, jax.random.key(0), prompt_lengths=prompts.lengths, max_new_tokens=24,
        stop_token_ids=models.stop_token_ids(DEMO, tokenizer),
    )  # fmt: skip
    rows = np.zeros((128, prompts.tokens.shape[1] + 24), np.int32)
    counts = np.zeros(rows.shape, bool)
    for row, count, prompt, n, completion, m in zip(
        rows, counts, prompts.tokens, prompts.lengths, said.completions, said.lengths, strict=True
    ):
        row[: n + m] = [*prompt[:n], *completion[:m]]
        count[n - 1 : n + m - 1] = True
    ours, theirs = (
        np.asarray(jax.nn.log_softmax(jax.jit(lambda m, t: m.logits(t))(model, rows)))[counts]
        for model in (exact, narrow)
    )
    kl = (np.exp(ours) * (ours - theirs)).sum(-1).mean()
    assert 1e-7 < kl < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_untied", "qwen3_tied"])
def test_spread_over_eight_devices_it_is_the_same(name):
    mesh = parallel.make_mesh(2, 2, 2)
    model, spread = (models.load(GOLDENS / name, dtype="int8", mesh=m) for m in (None, mesh))
    one, eight = flat(model), flat(spread)
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, eight[path], err_msg=path)
    assert eight["layers.attention.q.kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert eight["layers.attention.q.kernel_scale"].sharding.spec == P(None, "tensor")
    assert eight["layers.mlp.down.kernel_scale"].sharding.spec == P(None, "fsdp")
    assert eight["embedding_scale"].sharding.spec in (P("tensor"), P(None))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (8, 9)), jnp.int32)
    want = widened(model).logits(tokens)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda m, t: m.logits(t))(widened(spread), tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_what_it_is_not_for():
    model = models.load(GOLDENS / "qwen3_tied", dtype="int8")
    with pytest.raises(ValueError, match="int8, rounded for scoring: no checkpoint holds them"):
        models.save(model, "nowhere")
    with pytest.raises(ValueError, match="int8: it cannot be trained"):
        models.add_lora(model, rank=2, alpha=4, key=jax.random.key(0))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = models.load(GOLDENS / "qwen3_tied")
    kernel = model.layers.mlp.up.kernel
    kernel.set_value(kernel[...].at[1, 2, 3].set(jnp.inf))
    models.save(model, tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"model.layers.\d.mlp.up_proj.weight' holds a value that is not finite"
    ):
        models.load(tmp_path / "model", dtype="int8")
