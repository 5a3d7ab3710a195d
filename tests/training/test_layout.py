"""What an axis of the mesh does not divide: refused, or told."""

import json
import types

import pytest

from opd_jax.training._layout import check_split

SIZES = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=1000, hidden_size=96, head_dim=16,
    num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, intermediate_size=128,
)  # fmt: skip


@pytest.fixture
def model(tmp_path):
    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps(SIZES | changes))
        return str(tmp_path)

    return write


def mesh(fsdp=1, tensor=1):
    return types.SimpleNamespace(shape=dict(data=1, fsdp=fsdp, tensor=tensor))


def test_the_work_of_a_layer_must_be_split(model):
    with pytest.raises(ValueError, match=r"mesh\.tensor is 4, .* the 6 attention heads .* that does is 3"):
        check_split(model(), mesh(tensor=4))
    with pytest.raises(ValueError, match=r"mesh\.tensor is 3, .* the 128 columns of the MLP .* does is 2"):
        check_split(model(), mesh(tensor=3))


def test_what_may_stay_whole_is_told(model):
    assert check_split(model(), mesh(fsdp=8, tensor=2)) == []
    vocabulary, width = check_split(model(vocab_size=1001), mesh(fsdp=5, tensor=2))
    assert "the 1001 tokens of the vocabulary" in vocabulary and vocabulary.endswith("nearest that does is 1")
    assert "mesh.fsdp is 5" in width and "the 96 columns of the width" in width and width.endswith("is 4")
