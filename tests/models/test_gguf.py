"""GGUF files written here from the goldens, and the real one of SmolLM2."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opd_jax import models
from opd_jax.models import _names

from .conftest import GOLDENS
from .test_load_save import assert_same, leaves

gguf = pytest.importorskip("gguf")


def interleave(rows, heads):
    """How llama.cpp's converter stores the q and k rows of Llama."""
    grouped = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return grouped.swapaxes(1, 2).reshape(rows.shape)


def write(model, path, kind="F32", **fields):
    """Writes `model` as GGUF, matrices in the format `kind`."""
    c = model.config
    arch = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}.get(c.architecture, "qwen3")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.layers)
    writer.add_context_length(c.max_length)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.ff_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_epsilon)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_eos_token_id(c.eos_token_ids[0])
    for key, value in fields.items():
        getattr(writer, key)(value)
    params = nnx.state(model, nnx.Param)
    values = {tuple(p): np.asarray(v.get_value(), np.float32) for p, v in nnx.to_flat_state(params)}
    for parameter in _names.parameters(c, params):
        stack = values[parameter.path]
        for layer, name in enumerate(parameter.gguf_names):
            tensor = stack[layer] if parameter.stacked else stack
            tensor = tensor.T if parameter.transposed else tensor
            if arch == "llama" and ("attn_q." in name or "attn_k." in name):
                tensor = interleave(tensor, c.heads if "attn_q." in name else c.kv_heads)
            used = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
            tensor = gguf.quants.quantize(np.ascontiguousarray(tensor), used)
            writer.add_tensor(name, tensor, raw_dtype=used)
    if c.rope_scaling is not None and c.rope_scaling.type == "llama3":
        from opd_jax.models._rope import rope_frequencies

        plain, scaled = (rope_frequencies(c.head_width, c.rope_theta, s) for s in (None, c.rope_scaling))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "name", ["llama_mha", "llama_bias", "smollm2", "qwen2_tied", "qwen2_untied", "qwen3_wide_heads"]
)
def test_float32_gguf_is_the_same_model(name, tmp_path):
    model = models.load(GOLDENS / name, dtype="float32")
    ours = models.load(write(model, tmp_path / "model.gguf"))
    golden = np.load(GOLDENS / name / "golden.npz")
    for x, y in zip(leaves(model), leaves(ours), strict=True):
        np.testing.assert_array_equal(x, y)
    logits = ours.logits(jnp.asarray(golden["tokens"], jnp.int32))
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


@pytest.mark.slow
def test_llama3_scaling_is_recognised(tmp_path):
    model = models.load(GOLDENS / "llama_mha", dtype="float32")
    import dataclasses

    scaling = models.RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(model.config, rope_scaling=scaling, rope_theta=500000.0)
    config = dataclasses.replace(config, head_width=64)
    scaled = models.Decoder(config, rngs=nnx.Rngs(0))
    ours = models.load_config(write(scaled, tmp_path / "model.gguf"))
    assert ours.rope_scaling == scaling
    odd = dataclasses.replace(config, rope_scaling=models.RopeScaling("llama3", 8.0, 2.0, 4.0, 8192))
    path = write(models.Decoder(odd, rngs=nnx.Rngs(0)), tmp_path / "odd.gguf")
    with pytest.raises(ValueError, match="not the scaling of Llama 3"):
        models.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_other_formats_are_close(kind, tmp_path):
    config = models.DecoderConfig(
        vocab_size=64, width=64, layers=2, heads=2, kv_heads=1, head_width=32, ff_width=96,
        eos_token_ids=(2,),
    )  # fmt: skip
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    ours = models.load(write(model, tmp_path / "model.gguf", kind))
    step = {"F16": 1e-3, "BF16": 8e-3, "Q8_0": 1e-2}.get(kind, 0.16)
    for x, y in zip(leaves(model), leaves(ours), strict=True):
        assert float(jnp.abs(x - y).max()) <= step * float(jnp.abs(x).max())


def test_saved_gguf_reloads_from_its_folder(tmp_path):
    model = models.load(write(models.load(GOLDENS / "smollm2", dtype="float32"), tmp_path / "model.gguf"))
    with pytest.warns(UserWarning, match="saved without a tokenizer"):
        models.save(model, tmp_path / "saved")
    assert_same(model, models.load(tmp_path / "saved"))


def test_bad_files(tmp_path):
    path = write(models.load(GOLDENS / "qwen2_tied"), tmp_path / "model.gguf")
    whole = path.read_bytes()
    for keep in (0, 3, 30, 200, len(whole) - 500):
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=r"model\.gguf"):
            models.load(path)
    path.write_bytes(b"PK" + whole[2:])
    with pytest.raises(ValueError, match=r"not a GGUF file"):
        models.load(path)
    path.write_bytes(whole.replace(b"qwen2", b"gemma"))
    with pytest.raises(ValueError, match=r"unknown architecture 'gemma'; known: llama, qwen2"):
        models.load(path)
    path.write_bytes(whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(ValueError, match=r"'blk\.1\.ffn_up\.weight' of shape \(40, 24\) is missing"):
        models.load(path)


def test_yarn_is_refused(tmp_path):
    model = models.load(GOLDENS / "qwen2_tied")
    path = write(model, tmp_path / "model.gguf", add_rope_scaling_type=gguf.RopeScalingType.YARN)
    with pytest.raises(ValueError, match="rope scaling 'yarn' is not supported"):
        models.load(path)


# The real model.


@pytest.mark.network
def test_smollm2_continues_greedily_as_transformers_does(smollm2):
    pytest.importorskip("transformers")
    records = json.loads((GOLDENS / "smollm2.json").read_text())
    tokenizer = models.load_tokenizer(smollm2)
    model = models.load(smollm2, dtype="float32")
    width = max(len(r["prompt"]) + len(r["completion"]) for r in records)
    rows = np.zeros((len(records), width), np.int32)
    for row, record in zip(rows, records, strict=True):
        if record["chat"]:
            turn = [{"role": "user", "content": record["text"]}]
            ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        else:
            ids = tokenizer(record["text"])["input_ids"]
        assert list(ids) == record["prompt"]
        assert tokenizer.decode(record["completion"]) == record["completion_text"]
        row[: len(ids) + len(record["completion"])] = record["prompt"] + record["completion"]
    # One forced pass shows the same as decoding token by token, where every choice agrees.
    best = np.asarray(jax.jit(lambda m, t: m.logits(t).argmax(-1))(model, rows))
    for row, record in zip(best, records, strict=True):
        start = len(record["prompt"]) - 1
        assert row[start : start + len(record["completion"])].tolist() == record["completion"]


@pytest.mark.network
def test_smollm2_tokenizer(smollm2):
    pytest.importorskip("transformers")
    tokenizer = models.load_tokenizer(smollm2)
    # Digits stand alone, and the spaces before them are one token: SmolLM2 splits digits first.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  12")) == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("naïve 日本 👍\n")) == "naïve 日本 👍\n"
    assert len(tokenizer) == 49152 and tokenizer.model_max_length == 8192
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert models.stop_token_ids(smollm2, tokenizer) == (2,)
    assert os.path.getsize(smollm2 / "model.safetensors") < 540e6  # The tied head is stored once.
