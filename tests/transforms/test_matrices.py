"""Which leaves are matrices, and how they are unfolded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax.transforms import MatrixAxes, all_matrices, block_matrices
from opd_jax.transforms._matrices import from_stack, kind_of, path_name, select, to_stack
from opd_jax.transforms._products import paired


def zeros(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


LLAMA = {  # of Hugging Face, MaxText and this project
    "model": {
        "embed_tokens": {"weight": zeros(9, 4)},
        "layers": {"0": {"self_attn": {"q_proj": zeros(4, 4)}}},
    },
    "decoder": {
        "mlp": {"wi_0": {"kernel": zeros(2, 4, 8)}},
        "pre_self_attention_norm": {"scale": zeros(2, 4)},
    },
    "layers": {"attention": {"o": {"kernel": zeros(2, 4, 4), "bias": zeros(2, 4)}}, "router": zeros(4, 3)},
    "lm_head": zeros(4, 9),
    "b": zeros(2, 4),
    "step": zeros(),
}


def test_kinds_by_name():
    for name, kind in {
        "model.layers.0.self_attn.q_proj": "attention",
        "layers.attention.o.kernel": "attention",
        "decoder.mlp.wi_0.kernel": "mlp",
        "block.0.ffn.w1": "mlp",
        "layers.feed_forward.down_proj": "mlp",
        "model.embed_tokens.weight": "embedding",
        "lm_head": "embedding",
        "layers.router": "other",
    }.items():
        assert kind_of(name) == kind, name


def test_default_selections():
    def names(matrices):
        return {m.name for m in select(LLAMA, matrices, "test")}

    blocks = {
        "model.layers.0.self_attn.q_proj",
        "decoder.mlp.wi_0.kernel",
        "layers.attention.o.kernel",
        "layers.router",
    }
    assert names(block_matrices) == names(None) == blocks
    assert names(all_matrices) == blocks | {"model.embed_tokens.weight", "lm_head"}


@pytest.mark.parametrize(
    ("shape", "axes", "unfolded"),
    [
        ((4, 6), MatrixAxes(), (1, 4, 6)),
        ((3, 4, 6), MatrixAxes(), (3, 4, 6)),
        ((4, 2, 5), MatrixAxes((0,), (1, 2)), (1, 4, 10)),
        ((3, 4, 2, 5), MatrixAxes((1,), (2, 3)), (3, 4, 10)),
        ((2, 5, 3, 4), MatrixAxes((0, 1), (-1,)), (3, 10, 4)),  # the stack in the middle
        ((6, 4), MatrixAxes((1,), (0,)), (1, 4, 6)),
    ],
)
def test_unfolding_and_back(shape, axes, unfolded):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    (matrix,) = select({"w": x}, {"w": axes}, "test")
    assert matrix.shape == unfolded
    stack = to_stack(jnp.asarray(x), matrix)
    np.testing.assert_array_equal(from_stack(stack, matrix, shape), x)
    rest = [a for a in range(x.ndim) if a not in matrix.axes.rows + matrix.axes.columns]
    order = [*rest, *matrix.axes.rows, *matrix.axes.columns]
    np.testing.assert_array_equal(stack, x.transpose(order).reshape(unfolded))


def test_holes_and_marks():
    params = {"a": zeros(2, 3), "b": None, "c": optax.MaskedNode(), "d": zeros(2, 3)}
    found = select(params, {"a": False, "b": None, "c": optax.MaskedNode(), "d": True}, "test")
    assert [(m.index, m.name) for m in found] == [(1, "d")]
    assert [m.name for m in select(params, lambda p: all_matrices(p), "test")] == ["a", "d"]


@pytest.mark.parametrize(
    ("params", "matrices", "message"),
    [
        ({"norm": zeros(4)}, None, r"no matrix is selected among the 1 parameters \(norm\)"),
        ({"w": zeros(4, 4)}, {"w": "yes"}, "'yes' at w; use MatrixAxes, a bool or None"),
        ({"w": zeros(4, 4)}, {"v": True}, "`matrices` must be a tree like the parameters"),
        ({"w": zeros(4, 4)}, {"w": MatrixAxes((0,), (2,))}, r"w has shape \(4, 4\), which has no axes"),
        ({"w": zeros(4, 4)}, {"w": MatrixAxes((0,), (-2,))}, "names an axis twice"),
        ({"w": zeros(4, 4)}, {"w": MatrixAxes((), (1,))}, "no rows or no columns"),
    ],
)
def test_bad_selections(params, matrices, message):
    with pytest.raises(ValueError, match=f"test: .*{message}"):
        select(params, matrices, "test")


def test_adapters_are_pairs():
    params = {
        "q": {"lora_a": zeros(2, 8, 3), "lora_b": zeros(2, 3, 6)},  # this project
        "k": {"w_lora_a": zeros(8, 3), "w_lora_b": zeros(3, 6)},  # qwix
        "v": {
            "lora_A": zeros(3, 8),
            "lora_B": zeros(6, 3),
        },  # [rank, in], [out, rank]: no product in this order
        "o": {"lora_a": zeros(8, 3)},  # the other is frozen
        "up": zeros(8, 6),
    }
    found = paired(select(params, None, "test"))
    assert {m.name: m.shape for m in found} == {
        "q": (2, 8, 6),
        "k.w": (1, 8, 6),
        "v.lora_A": (1, 3, 8),
        "v.lora_B": (1, 6, 3),
        "o.lora_a": (1, 8, 3),
        "up": (1, 8, 6),
    }


def test_names_of_paths():
    tree = {"layers": [{"kernel": {"value": 1}}]}
    ((path, _),) = jax.tree_util.tree_leaves_with_path(tree)
    assert path_name(path) == "layers.0.kernel"
