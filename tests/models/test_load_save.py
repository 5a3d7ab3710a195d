import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from opd_jax import models

from .conftest import GOLDENS, NAMES


def leaves(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))


def assert_same(a, b):
    assert a.config == b.config
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def edit(folder, change):
    """Rewrites the weights of a copied golden."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def copy(tmp_path):
    """A writable copy of an untied golden."""
    return shutil.copytree(GOLDENS / "qwen2_untied", tmp_path / "model")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", [2**30, 5000])
def test_round_trip_is_bitwise(name, dtype, limit, tmp_path):
    model = models.load(GOLDENS / name, dtype=dtype)
    models.save(model, tmp_path / "saved", max_shard_bytes=limit)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists() == (limit == 5000)
    assert_same(model, models.load(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["dtype"] == dtype


def test_shards_respect_the_limit_and_the_index_is_complete(tmp_path):
    models.save(models.load(GOLDENS / "llama_mha"), tmp_path / "saved", max_shard_bytes=5000)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    names, total = set(), 0
    for file in set(index["weight_map"].values()):
        tensors = safetensors.numpy.load_file(tmp_path / "saved" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 5000
        total += sum(t.nbytes for t in tensors.values())
        names |= set(tensors)
    assert names == set(index["weight_map"]) and total == index["metadata"]["total_size"]


def test_a_tied_head_is_not_stored_and_may_be(tmp_path):
    folder = tmp_path / "saved"
    model = models.load(GOLDENS / "qwen3_tied")
    models.save(model, folder)
    assert "lm_head.weight" not in safetensors.numpy.load_file(folder / "model.safetensors")
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert_same(model, models.load(folder))


def test_old_rotary_buffers_are_ignored(copy):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(copy, lambda t: t.update({name: np.ones(3, np.float32)}))
    models.load(copy)


def test_companions_are_copied(copy, tmp_path):
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (copy / "tokenizer_config.json").write_text("{}")
    (copy / "notes.txt").write_text("private")
    models.save(models.load(copy), tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    original = (copy / "generation_config.json").read_text()
    assert (tmp_path / "saved" / "generation_config.json").read_text() == original


def test_a_companion_that_is_a_link_out_is_not_followed(copy, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (copy / "tokenizer.json").symlink_to(secret)
    model = models.load(copy)
    with pytest.raises(ValueError, match="link out of the folder"):
        models.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert not list(tmp_path.glob(".saved*"))


def test_saving_again_replaces_the_model_whole(tmp_path):
    folder = tmp_path / "saved"
    models.save(models.load(GOLDENS / "llama_mha"), folder, max_shard_bytes=5000)
    model = models.load(GOLDENS / "qwen3_tied")
    models.save(model, folder)
    assert not list(folder.glob("model-*"))
    assert_same(model, models.load(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_saving_over_its_own_source(copy):
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (copy / "golden.npz").unlink()
    models.save(models.load(copy), copy)
    assert (copy / "chat_template.jinja").read_text() == "{{ messages }}"


def test_saving_over_something_else_is_refused(copy, tmp_path):
    model = models.load(copy)
    with pytest.raises(FileExistsError, match=r"'golden\.npz', which is no part of a saved model"):
        models.save(model, copy)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="not a folder"):
        models.save(model, tmp_path / "file")


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    folder = tmp_path / "saved"
    old = models.load(GOLDENS / "llama_mha")
    models.save(old, folder)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        models.save(models.load(GOLDENS / "qwen3_tied"), folder)
    assert_same(old, models.load(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_default_dtype_is_the_stored_one(copy):
    assert models.load(copy).embedding.dtype == jnp.bfloat16
    edit(copy, lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()}))
    assert models.load(copy).embedding.dtype == jnp.float32


def test_missing_tensor(copy):
    edit(copy, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    message = r"model\.safetensors: tensor 'model\.layers\.1\.mlp\.up_proj\.weight' of shape"
    with pytest.raises(ValueError, match=message + r" \(40, 24\) is missing"):
        models.load(copy)


def test_missing_head(copy):
    edit(copy, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"'lm_head.weight'.*tie_word_embeddings=false"):
        models.load(copy)


def test_misshapen_tensor(copy):
    name = "model.layers.0.self_attn.k_proj.weight"
    edit(copy, lambda t: t.update({name: t[name][:-1]}))
    with pytest.raises(ValueError, match=rf"{name}' has shape \(11, 24\), expected \(12, 24\)"):
        models.load(copy)


def test_unexpected_tensor(copy):
    edit(copy, lambda t: t.update({"model.layers.0.surprise": np.ones(1, np.float32)}))
    with pytest.raises(ValueError, match=r"unexpected tensors for Qwen2.*model\.layers\.0\.surpr"):
        models.load(copy)


def test_unsupported_dtype(copy):
    name = "model.norm.weight"
    edit(copy, lambda t: t.update({name: t[name].astype(np.int8)}))
    with pytest.raises(ValueError, match=rf"'{name}' has dtype I8; supported"):
        models.load(copy)


@pytest.mark.parametrize("keep", [0, 4, 100, 20000])
def test_truncated_file(copy, keep):
    file = copy / "model.safetensors"
    os.truncate(file, keep)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors"):
        models.load(copy)


def test_absurd_header_length(copy):
    (copy / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        models.load(copy)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "..", "a\\b", 3])
def test_index_that_points_outside(copy, name):
    index = {"weight_map": {"model.norm.weight": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"not a plain file name|is missing"):
        models.load(copy)


def test_index_that_links_outside(copy, tmp_path):
    (copy / "model.safetensors").rename(tmp_path / "elsewhere")
    (copy / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="link out of the folder"):
        models.load(copy)


def test_hub_cache_layout_is_read(tmp_path):
    repo = tmp_path / "models--a--b"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "abc"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((GOLDENS / "llama_mha").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert_same(models.load(snapshot), models.load(GOLDENS / "llama_mha"))


def test_index_that_is_wrong(copy):
    index = {"weight_map": {"model.nothing": "model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'model\.nothing' in model\.safetensors, which lacks"):
        models.load(copy)
    (copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not valid JSON"):
        models.load(copy)


def test_only_pickled_weights(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither model\.safetensors.*only pytorch_model\.bin"):
        models.load(copy)


def test_not_a_model(tmp_path, copy):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        models.load(tmp_path)
    with pytest.raises(ValueError, match=r"not a \.gguf; give the model's folder"):
        models.load(copy / "config.json")
    with pytest.raises(FileNotFoundError, match=r"not a folder, not a \.gguf file, and not a hub id"):
        models.load(tmp_path / "nothing" / "here")


def test_quantised_checkpoint_is_refused(copy):
    hf = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(dict(hf, quantization_config={"quant_method": "gptq"})))
    with pytest.raises(ValueError, match=r"quantised \(gptq\) weights are not supported"):
        models.load(copy)


def test_hub_id_offline(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def snapshot_download(name, allow_patterns):
        calls.append((name, allow_patterns))
        if name == "some/model":
            return str(GOLDENS / "llama_mha")
        raise OSError("offline")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert_same(models.load("some/model"), models.load(GOLDENS / "llama_mha"))
    assert calls[0][0] == "some/model" and not any("bin" in p for p in calls[0][1])
    with pytest.raises(FileNotFoundError, match=r"as a hub id it could not be fetched.*offline"):
        models.load("other/model")


def test_unsupported_dtype_argument(copy):
    with pytest.raises(ValueError, match="dtype is float16; it must be float32, bfloat16 or int8"):
        models.load(copy, dtype="float16")


def test_stop_token_ids(copy):
    class Tokenizer:
        eos_token_id = 7

    generation = copy / "generation_config.json"
    generation.write_text('{"eos_token_id": [9, 5]}')
    assert models.stop_token_ids(copy) == (5, 9)
    assert models.stop_token_ids(copy, Tokenizer()) == (5, 7, 9)
    generation.write_text("{}")
    assert models.stop_token_ids(copy) == (2,)
    generation.unlink()
    assert models.stop_token_ids(copy) == (2,)


def test_missing_tokenizer(copy):
    with pytest.raises(ValueError, match=r"has no tokenizer: none of tokenizer\.json"):
        models.load_tokenizer(copy)
    pytest.importorskip("transformers")
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="no tokenizer could be loaded from"):
        models.load_tokenizer(copy)
