import json

import pytest

from opd_jax import models

from .conftest import GOLDENS, NAMES

LLAMA_3 = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=dict(
        factor=32.0,
        high_freq_factor=4.0,
        low_freq_factor=1.0,
        original_max_position_embeddings=8192,
        rope_type="llama3",
    ),
    tie_word_embeddings=True,
    max_position_embeddings=131072,
    bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009],
    torch_dtype="bfloat16",
)


def test_llama_3_as_transformers_4_wrote_it():
    config = models.DecoderConfig.from_hf(LLAMA_3)
    assert config.head_width == 64 and config.kv_heads == 8 and config.tie_embeddings
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == models.RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert config.eos_token_ids == (128001, 128008, 128009)


def test_defaults_are_those_of_the_architecture():
    small = dict(vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1)
    llama = models.DecoderConfig.from_hf(
        dict(small, architectures=["LlamaForCausalLM"], num_attention_heads=4)
    )
    qwen3 = models.DecoderConfig.from_hf(
        dict(small, architectures=["Qwen3ForCausalLM"], num_attention_heads=32)
    )
    qwen2 = models.DecoderConfig.from_hf(
        dict(small, architectures=["Qwen2ForCausalLM"], num_attention_heads=32)
    )
    assert (llama.head_width, llama.kv_heads, llama.attention_bias) == (16, 4, False)
    assert (qwen3.head_width, qwen3.kv_heads, qwen3.qk_norm) == (128, 32, True)
    assert (qwen2.head_width, qwen2.attention_bias, qwen2.output_bias) == (2, True, False)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name):
    hf = json.loads((GOLDENS / name / "config.json").read_text())
    config = models.DecoderConfig.from_hf(hf)
    written = json.loads(json.dumps(config.to_hf()))
    assert models.DecoderConfig.from_hf(written) == config
    assert {k: v for k, v in written.items() if k in hf and k != "head_dim"} == {
        k: v for k, v in hf.items() if k != "head_dim"
    }


def test_round_trip_of_a_version_4_config():
    config = models.DecoderConfig.from_hf(LLAMA_3)
    assert models.DecoderConfig.from_hf(config.to_hf()) == config
    old_reader = {k: v for k, v in config.to_hf().items() if k != "rope_parameters"}
    assert models.DecoderConfig.from_hf(old_reader) == config
    assert models.DecoderConfig.from_hf(LLAMA_3).hf == LLAMA_3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(architectures=["GPT2LMHeadModel"]), "unknown architecture 'GPT2LMHeadModel'.*Llama"),
        (dict(architectures=None), "unknown architecture None"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope type 'dynamic' is not"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "rope type 'yarn' is not"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "lacks low_freq_factor"),
        (dict(rope_scaling=dict(rope_type="linear")), "rope type 'linear' lacks factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (dict(hidden_size=None), "has no 'hidden_size'"),
        (dict(num_attention_heads=30), "2048 is not a multiple of num_attention_heads 30"),
        (dict(num_key_value_heads=5), r"heads \(32\) must be a multiple of kv_heads \(5\)"),
        (dict(vocab_size=-4), "vocab_size is -4"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "sliding-window"),
        (
            dict(use_sliding_window=True, sliding_window=4096, max_window_layers=8),
            "sliding-window attention is not supported.*4096",
        ),
    ],
)
def test_what_would_change_the_logits_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        models.DecoderConfig.from_hf({**LLAMA_3, **changes})


def test_a_window_that_no_layer_uses_is_fine():
    unused = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=8)
    models.DecoderConfig.from_hf({**LLAMA_3, **unused})


def test_config_is_hashable():
    a, b = (models.DecoderConfig.from_hf(LLAMA_3, source=s) for s in ("here", "there"))
    assert a == b and hash(a) == hash(b)


@pytest.mark.parametrize(
    ("architecture", "field"),
    [
        ("Qwen2ForCausalLM", dict(attention_bias=False)),
        ("Qwen3ForCausalLM", dict(qk_norm=False)),
        ("Qwen3ForCausalLM", dict(mlp_bias=True)),
        ("LlamaForCausalLM", dict(output_bias=True)),
    ],
)
def test_a_variant_that_the_architecture_lacks_cannot_be_written(architecture, field):
    good = dict(qk_norm=architecture.startswith("Qwen3"))
    good["attention_bias"] = architecture.startswith("Qwen2")
    sizes = dict(vocab_size=8, width=8, layers=1, heads=2, kv_heads=1, head_width=4, ff_width=8)
    models.DecoderConfig(**sizes, architecture=architecture, **good).to_hf()
    config = models.DecoderConfig(**sizes, architecture=architecture, **{**good, **field})
    (name,) = field
    with pytest.raises(ValueError, match=f"{architecture} cannot express .*{name}={field[name]}"):
        config.to_hf()
