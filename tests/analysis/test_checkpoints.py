"""What is read is what was written, whatever wrote it; what cannot be read is named."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from opd_jax import models
from opd_jax.analysis import _checkpoints, _run, _sources, open_checkpoint
from opd_jax.analysis._names import place_of, step_of
from opd_jax.training._checkpoint import Checkpoints
from tests.analysis.folders import random_tensors, write_folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_reads_back(tmp_path, monkeypatch, dtype, shards):
    monkeypatch.setattr(_checkpoints, "BLOCK", 100)  # several blocks a matrix
    tensors = {name: value.astype(dtype) for name, value in random_tensors(0).items()}
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, shards=shards))
    matrices = [name for name in tensors if tensors[name].ndim == 2]
    assert sorted(checkpoint.names()) == sorted(matrices)
    for name in matrices:
        found = checkpoint.read(name)
        assert found.dtype == np.float32 and checkpoint.shape(name) == found.shape
        np.testing.assert_array_equal(found, tensors[name].astype(np.float32))


def test_names_come_in_the_order_of_the_model(tmp_path):
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (10, 2, 0)]
    names += ["lm_head.weight", "model.layers.2.self_attn.q_proj.weight", "model.embed_tokens.weight"]
    checkpoint = open_checkpoint(write_folder(tmp_path, {n: np.ones((2, 3), np.float32) for n in names}))
    short = [(place_of(name).layer, place_of(name).module) for name in checkpoint.names()]
    assert short == [(None, "embedding"), (0, "up"), (2, "q"), (2, "up"), (10, "up"), (None, "head")]


def test_stacked_tensors_are_parted_and_tied_heads_left_out(tmp_path):
    experts = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    tensors = {"model.layers.0.mlp.experts.up_proj": experts, "lm_head.weight": np.ones((4, 4), np.float32)}
    tensors["model.layers.0.position_ids"] = np.ones((3, 3), np.int64)
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, tie_word_embeddings=True))
    assert checkpoint.names() == tuple(f"model.layers.0.mlp.experts.up_proj[{i}]" for i in range(3))
    np.testing.assert_array_equal(checkpoint.read(checkpoint.names()[2]), experts[2])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_decoder_in_memory_is_its_folder(tmp_path, make_model, dtype):
    model = make_model(1)
    model = jax.tree.map(lambda x: x.astype(dtype), model)
    models.save(model, tmp_path / "model")
    folder, memory = open_checkpoint(tmp_path / "model"), open_checkpoint(model)
    assert folder.names() == memory.names() and folder.architecture == memory.architecture
    for name in folder.names():
        np.testing.assert_array_equal(folder.read(name), memory.read(name))


def test_a_run_folder_is_its_final_model(tmp_path, way):
    _, tensors = way
    (tmp_path / "config.yaml").write_text("steps: 7\n")
    with pytest.raises(ValueError, match="without a final model"):
        open_checkpoint(tmp_path)
    write_folder(tmp_path / "model", tensors[40])
    found = open_checkpoint(tmp_path).read("lm_head.weight")
    np.testing.assert_array_equal(found, tensors[40]["lm_head.weight"])


def save_step(folder, step, model):
    """A checkpoint as the training loop writes it."""
    checkpoints = Checkpoints(folder, keep=9)
    state = {"params": nnx.state(model, nnx.Param), "opt_state": {"count": jnp.zeros((), jnp.int32)}}
    checkpoints.save(step, state, {})
    checkpoints.wait()
    checkpoints.close()
    return folder / str(step)


def test_a_runs_own_checkpoints(tmp_path, make_model):
    model = make_model(1)
    run = tmp_path / "run"
    for step in (4, 8):
        save_step(run / "checkpoints", step, model)
    (run / "config.yaml").write_text("steps: 8")
    (run / "metrics.jsonl").write_text("")
    found, memory = open_checkpoint(run / "checkpoints" / "4"), open_checkpoint(model)
    assert found.step == 4 and found.names() == memory.names()
    for name in found.names():
        np.testing.assert_array_equal(found.read(name), memory.read(name))
        assert found.digest(name) == memory.digest(name)
    assert found.identity(name) != open_checkpoint(run / "checkpoints" / "8").identity(name)
    assert [path.name for path in _run.expand(run)] == ["4", "8"]
    models.save(model, run / "model")
    assert _run.expand(run) == [run / "checkpoints" / "4", run]  # the last is the final model
    adapted = models.add_lora(model, rank=1, alpha=1, key=jax.random.key(0))
    with pytest.raises(ValueError, match="adapters of a LoRA run"):
        open_checkpoint(save_step(tmp_path / "lora", 4, adapted))
    for path in (run / "checkpoints" / "8" / "state").rglob("d/*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"8 cannot be read|an array is damaged"):
        open_checkpoint(run / "checkpoints" / "8").read(name)


def adapter_of(model, folder, **changes):
    adapted = models.add_lora(model, rank=2, alpha=6.0, targets=("q", "down"), key=jax.random.key(0))
    for target in ("attention.q", "mlp.down"):
        part, name = target.split(".")
        leaf = getattr(getattr(adapted.layers, part), name).adapter.lora_b
        leaf.set_value(jax.random.normal(jax.random.key(1), leaf.shape))
    models.save_lora(adapted, folder)
    if changes:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return adapted


def test_an_adapter_is_merged_into_its_base(tmp_path, make_model):
    model = make_model(0)
    merged = open_checkpoint(models.merge_lora(adapter_of(model, tmp_path / "checkpoint-3")))
    base = open_checkpoint(model)
    adapter = open_checkpoint(tmp_path / "checkpoint-3", base=base)
    assert adapter.step == 3 and adapter.names() == merged.names()
    for name in base.names():
        np.testing.assert_allclose(adapter.read(name), merged.read(name), rtol=1e-6, atol=1e-7)
        # Against its base the update is of exactly that rank: no rounding to the weights' size.
        (update,) = adapter.difference(base, name, 1000)
        np.testing.assert_allclose(update, merged.read(name) - base.read(name), atol=2e-6)
        if "q_proj" in name:
            values = np.linalg.svd(update.astype(np.float64), compute_uv=False)
            assert values[1] > 1e-2 and values[2] < 1e-6 * values[0]
    large = open_checkpoint(jax.tree.map(lambda x: 1000 * x, model))
    name = next(name for name in base.names() if "q_proj" in name)
    on_large = open_checkpoint(tmp_path / "checkpoint-3", base=large)
    (exact,), (same,) = adapter.difference(base, name, 1000), on_large.difference(large, name, 1000)
    np.testing.assert_array_equal(exact, same)
    other = open_checkpoint(make_model(5))
    (update,) = adapter.difference(other, base.names()[1], 1000)
    np.testing.assert_array_equal(update, adapter.read(base.names()[1]) - other.read(base.names()[1]))


def test_adapters_that_cannot_be_merged(tmp_path, make_model):
    model = make_model(0)
    adapter_of(model, tmp_path / "a", base_model_name_or_path="owner/name")
    with pytest.raises(ValueError, match=r"needs its base \(it names 'owner/name'\)"):
        open_checkpoint(tmp_path / "a")
    with pytest.raises(ValueError, match=r"does not fit .*is that the adapter's base"):
        open_checkpoint(tmp_path / "a", base=open_checkpoint(make_model(0, ff_width=32, width=24)))
    adapter_of(model, tmp_path / "b", use_dora=True)
    with pytest.raises(ValueError, match="use_dora"):
        open_checkpoint(tmp_path / "b", base=open_checkpoint(model))


def test_what_cannot_be_read_is_named(tmp_path):
    tensors = random_tensors(0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has neither"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="GGUF"):
        open_checkpoint(tmp_path / "x.gguf")
    write_folder(tmp_path / "awq", tensors, quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match="awq"):
        open_checkpoint(tmp_path / "awq")
    missing = write_folder(tmp_path / "missing", tensors, shards=2) / "model-00002-of-00002.safetensors"
    missing.unlink()
    with pytest.raises(ValueError, match=missing.name):
        open_checkpoint(tmp_path / "missing")
    cut = write_folder(tmp_path / "cut", tensors) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        open_checkpoint(tmp_path / "cut")
    with pytest.raises(ValueError, match="no matrices"):
        open_checkpoint({"bias": np.ones((3, 3)), "x": np.ones(3)})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mlp.up_proj.weight", "F8_E4M3"), ("mlp.up_proj.weight", "U8"), ("mlp.up_proj.qweight", "I32")],
)
def test_quantised_tensors_are_named(tmp_path, name, dtype):
    size = 64 if dtype == "I32" else 16
    header = json.dumps({name: {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, size]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(size)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}.*quantised"):
        open_checkpoint(tmp_path)


def test_digests_follow_content_and_identities_follow_files(tmp_path):
    tensors = random_tensors(0)
    a = open_checkpoint(write_folder(tmp_path / "a", tensors))
    b = open_checkpoint(write_folder(tmp_path / "b", tensors, shards=3))
    name = "lm_head.weight"
    assert a.digest(name) == b.digest(name) and a.identity(name) != b.identity(name)
    before = a.identity(name)
    tensors[name][3, 3] += 1e-3
    changed = open_checkpoint(write_folder(tmp_path / "a", tensors))
    assert changed.digest(name) != b.digest(name) and changed.identity(name) != before
    assert changed.digest("model.embed_tokens.weight") == b.digest("model.embed_tokens.weight")
    tree = open_checkpoint({"w": tensors[name]})
    assert tree.digest("w") == open_checkpoint({"w": jnp.asarray(tensors[name])}).digest("w")
    assert tree.digest("w") != open_checkpoint({"w": tensors[name].astype(np.float64)}).digest("w")


def test_reading_does_not_map_files(tmp_path):
    # What is mapped counts as memory of the process as it is read: of an 8B pair, 32 GB.
    checkpoint = open_checkpoint(write_folder(tmp_path, random_tensors(0)))
    assert isinstance(checkpoint, _sources.FolderCheckpoint)
    block = next(checkpoint.blocks("lm_head.weight", 4))
    assert block.base is None and block.flags.owndata


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("a/checkpoint-500", 500),
        ("a/global_step_20/actor/huggingface", 20),
        ("a/step-3-merged", 3),
        ("a/00040", 40),
        ("iter_0000007/hf", 7),
        ("Qwen/Qwen3-8B", None),
        ("runs/sft1/model", None),
        ("a/checkpoint-5/checkpoint-6", 6),
    ],
)
def test_steps_of_names(path, step):
    assert step_of(path) == step


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", (None, "embedding", "embedding")),
        ("lm_head.weight", (None, "head", "embedding")),
        ("model.layers.11.self_attn.o_proj.weight", (11, "o", "attention")),
        ("layers.1.feed_forward.down.weight", (1, "down", "mlp")),
        ("transformer.h.3.attn.c_attn.weight", (3, "other", "attention")),
        ("model.layers.0.mlp.experts.7.gate_proj.weight", (0, "gate", "mlp")),
        ("model.layers.0.self_attn.qkv_proj.weight", (0, "other", "attention")),
        ("model.layers.0.attention.output.dense.weight", (0, "other", "attention")),
        ("transformer.wte.weight", (None, "embedding", "embedding")),
        ("score.weight", (None, "other", "other")),
    ],
)
def test_places_of_names(name, place):
    assert place_of(name) == place
