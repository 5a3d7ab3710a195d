"""Adapter folders: out and in, what is refused, and `peft` itself."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from opd_jax import models

from .conftest import GOLDENS
from .test_lora import adapt, linear, logits

pytestmark = pytest.mark.usefixtures("quick_compilation")

HF = "base_model.model.model.layers.{}.{}_proj.lora_{}.weight"


@pytest.fixture
def saved(tiny, tmp_path):
    models.save_lora(adapt(tiny, targets=("q", "down")), tmp_path / "adapter", base="owner/base")
    return tmp_path / "adapter"


def edit(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder, change):
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")


def test_folder_is_that_of_peft(tiny, saved):
    assert sorted(p.name for p in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((saved / "adapter_config.json").read_text())
    expected = dict(
        peft_type="LORA", task_type="CAUSAL_LM", r=3, lora_alpha=6, bias="none",
        target_modules=["down_proj", "q_proj"], base_model_name_or_path="owner/base",
    )  # fmt: skip
    assert expected.items() <= config.items()
    tensors = safetensors.numpy.load_file(saved / "adapter_model.safetensors")
    adapter = adapt(tiny, targets=("q", "down")).layers.mlp.down.adapter
    assert len(tensors) == 3 * 2 * 2
    name = HF.format(2, "mlp.down", "A")
    np.testing.assert_array_equal(tensors[name], adapter.lora_a[2].T)
    np.testing.assert_array_equal(tensors[HF.format(2, "mlp.down", "B")], adapter.lora_b[2].T)
    assert HF.format(0, "self_attn.q", "B") in tensors


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_is_bitwise(tiny, dtype, tmp_path):
    adapted = adapt(tiny, dtype=dtype, alpha=2.5)
    for _ in range(2):  # the second replaces the first
        models.save_lora(adapted, tmp_path / "adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    again = models.load_lora(tiny, tmp_path / "adapter", dtype=dtype)
    assert nnx.graphdef(again) == nnx.graphdef(adapted)
    for a, b in zip(jax.tree.leaves(adapted), jax.tree.leaves(again), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_saving_over_something_else_is_refused(tiny, saved):
    (saved / "notes.txt").write_text("")
    adapted = adapt(tiny, targets=("q",))
    with pytest.raises(FileExistsError, match=r"'notes\.txt', which is no part of a saved adapter"):
        models.save_lora(adapted, saved)
    with pytest.raises(FileExistsError, match="not a folder"):
        models.save_lora(adapted, saved / "notes.txt")
    with pytest.raises(ValueError, match=r"no adapters; save it with models\.save"):
        models.save_lora(tiny, saved)


def test_a_failed_save_leaves_the_old_adapter(tiny, saved, monkeypatch):
    before = (saved / "adapter_model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        models.save_lora(adapt(tiny), saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_rank_stabilised_scale(tiny, saved):
    """use_rslora: alpha / sqrt(r) in place of alpha / r."""
    edit(saved, use_rslora=True)
    assert linear(models.load_lora(tiny, saved), "q").adapter.scale == pytest.approx(6 / math.sqrt(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_dora=True), "use_dora is True, which is not supported"),
        (dict(rank_pattern={"q_proj": 4}), "rank_pattern is"),
        (dict(alpha_pattern={"q_proj": 4}), "alpha_pattern is"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save is"),
        (dict(layers_to_transform=[0]), "layers_to_transform is"),
        (dict(something_new=1), "something_new is 1"),
        (dict(bias="all"), "bias is 'all'; supported: 'none'"),
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(task_type="SEQ_CLS"), "task_type is 'SEQ_CLS'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (dict(r="3"), "r is '3'"),
        (dict(r=4), r"lora_A\.weight' has shape \(3, .*expected \(4, "),
        (dict(lora_alpha=None), "lora_alpha is None"),
    ],
)
def test_configs_that_are_refused(tiny, saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(ValueError, match=message):
        models.load_lora(tiny, saved)


def test_harmless_keys_are_read_over(tiny, saved):
    edit(saved, lora_dropout=0.1, peft_version="9", loftq_config={}, megatron_core="m", eva_config=None)
    models.load_lora(tiny, saved)


def test_tensors_that_are_refused(tiny, saved):
    name = HF.format(1, "self_attn.q", "A")
    lone = np.zeros((3, 16), np.float32)
    cases = [
        (lambda t: t.pop(name), rf"'{name}' is missing; adapters must be on all layers"),
        (lambda t: t.update({name: lone[:, :5].copy()}), r"has shape \(3, 5\), expected \(3, 16\)"),
        (lambda t: t.update({name: lone.astype(np.int8)}), "has dtype I8"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": lone}),
            r"unexpected.*lm_head\.lora_A",
        ),
        (
            lambda t: t.update({name.replace("lora_A", "lora_magnitude_vector"): lone}),
            "unexpected.*magnitude",
        ),
        (lambda t: t.clear(), "holds no tensors"),
    ]
    for change, message in cases:
        original = (saved / "adapter_model.safetensors").read_bytes()
        edit_tensors(saved, change)
        with pytest.raises(ValueError, match=message):
            models.load_lora(tiny, saved)
        (saved / "adapter_model.safetensors").write_bytes(original)


def test_files_that_are_refused(tiny, saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        models.load_lora(tiny, tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        models.load_lora(tiny, tmp_path)
    with pytest.raises(ValueError, match="adapters already"):
        models.load_lora(models.load_lora(tiny, saved), saved)
    weights = saved / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:50])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated or not a safetensors"):
        models.load_lora(tiny, saved)
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="link out of the folder"):
        models.load_lora(tiny, saved)
    weights.unlink()
    (saved / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only adapter_model\.bin: pickled weights are not read"):
        models.load_lora(tiny, saved)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["qwen3_tied", "llama_bias"])
def test_peft_loads_what_we_save(name, tmp_path):
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    tokens = jnp.asarray(np.load(GOLDENS / name / "golden.npz")["tokens"], jnp.int32)
    base = models.load(GOLDENS / name, dtype="float32")
    adapted = adapt(base)
    models.save(base, tmp_path / "base")
    models.save_lora(adapted, tmp_path / "adapter", base=tmp_path / "base")
    torch_base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(torch_base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(tokens), dtype=torch.int64)).logits.numpy()
    ours = logits(adapted, tokens)
    assert np.abs(ours - logits(base, tokens)).max() > 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
    # And we read what it writes.
    theirs.save_pretrained(tmp_path / "theirs")
    again = models.load_lora(base, tmp_path / "theirs")
    np.testing.assert_array_equal(logits(again, tokens), ours)
