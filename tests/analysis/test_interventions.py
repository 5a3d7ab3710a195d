"""Edited weights against edits by hand, and the driver that scores them."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from opd_jax import analysis, models
from opd_jax.analysis import _interventions, _trees
from tests.analysis.folders import random_tensors

DTYPES = [np.float32, ml_dtypes.bfloat16]
NORM = "model.layers.1.input_layernorm.weight"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def tensors(seed, dtype=np.float32, scale=1.0):
    return {name: value.astype(dtype) for name, value in random_tensors(seed, scale).items()}


def assert_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert np.asarray(found[name]).tobytes() == np.asarray(value).tobytes(), name


@pytest.fixture(scope="module")
def pair():
    return tensors(0), tensors(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_is_what_one_writes_by_hand(dtype):
    base, tuned = tensors(0, dtype), tensors(1, dtype, 1e-4)  # small: base + (tuned - base) is not tuned
    by_hand = {n: base[n].astype(np.float32) for n in base}
    by_hand = {n: b + np.float32(0.3) * (tuned[n].astype(np.float32) - b) for n, b in by_hand.items()}
    assert_bits(analysis.scale(base, tuned, 0.3), {n: v.astype(dtype) for n, v in by_hand.items()})
    assert_bits(analysis.scale(base, tuned, 0), base)
    assert_bits(analysis.scale(base, tuned, 1), tuned)


def test_the_wider_dtype_holds_both_ends():
    base, tuned = tensors(0, ml_dtypes.bfloat16), tensors(1)
    assert_bits(analysis.scale(base, tuned, 1), tuned)
    assert_bits(analysis.scale(base, tuned, 0), {n: v.astype(np.float32) for n, v in base.items()})


def test_swap_takes_both_embeddings_from_the_base(pair):
    base, tuned = pair
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    assert_bits(analysis.swap(base, tuned), tuned | {n: base[n] for n in embeddings})
    assert_bits(analysis.swap(base, tuned, "head"), tuned | {"lm_head.weight": base["lm_head.weight"]})


@pytest.mark.parametrize("tied", [True, False])
def test_swap_in_a_decoder(make_model, tied):
    base, tuned = (make_model(seed, tie_embeddings=tied) for seed in (0, 1))
    found = analysis.swap(base, tuned)
    own, other = nnx.state(base, nnx.Param), nnx.state(tuned, nnx.Param)
    np.testing.assert_array_equal(found.embedding.get_value(), own.embedding.get_value())
    assert ("head" in found) is not tied
    if not tied:
        np.testing.assert_array_equal(found.head.kernel.get_value(), own.head.kernel.get_value())
    for path, leaf in nnx.to_flat_state(other.layers):
        np.testing.assert_array_equal(
            dict(nnx.to_flat_state(found.layers))[path].get_value(), leaf.get_value()
        )


@pytest.mark.parametrize("centre", range(4))
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_windows_are_cut_at_both_ends(make_model, centre, kind):
    base, tuned = (nnx.state(make_model(seed, layers=4), nnx.Param) for seed in (0, 1))
    layers = analysis.window(centre, 1, 4)
    assert list(layers) == [i for i in range(4) if abs(i - centre) <= 1]
    found = dict(nnx.to_flat_state(analysis.inject(base, tuned, layers, kind)))
    before, after = dict(nnx.to_flat_state(base)), dict(nnx.to_flat_state(tuned))
    for path, leaf in found.items():
        expected = np.array(before[path].get_value())
        if path[:2] == ("layers", kind) and path[-1] == "kernel":
            expected[list(layers)] = after[path].get_value()[np.array(layers)]
        assert np.asarray(leaf.get_value()).tobytes() == expected.tobytes(), path


def test_wide_windows_hold_the_model():
    assert [len(analysis.window(centre, 8, 30)) for centre in (0, 8, 15, 29)] == [9, 17, 17, 9]
    assert list(analysis.window(2, 8, 4)) == [0, 1, 2, 3] and list(analysis.window(2, 0, 4)) == [2]


def by_svd(base, tuned, name, keep, matched):
    dw = tuned[name] - base[name]
    u, s, vt = np.linalg.svd(dw.astype(np.float64), full_matrices=False)
    rank = int(np.sum(s > max(dw.shape) * 2.0**-23 * s[0]))
    kept = keep(rank)
    part = (u[:, kept] * s[kept]) @ vt[kept]
    if matched:
        part *= np.linalg.norm(dw) / np.linalg.norm(part)
    return base[name] + part


@pytest.mark.parametrize("percent", [1, 7, 10, 50, 100])
@pytest.mark.parametrize("matched", [False, True])
def test_truncation_is_that_of_an_svd(pair, percent, matched):
    base, tuned = pair[0], dict(pair[1])
    low = np.linalg.svd(tuned[UP] - base[UP], full_matrices=False)
    tuned[UP] = base[UP] + (low[0][:, :5] * low[1][:5]) @ low[2][:5]  # of numerical rank 5
    factors = _interventions.Factors()
    for end in ("top", "bottom"):
        for again in range(2):  # the second from kept factors
            found = analysis.truncate(base, tuned, **{end: percent}, match_norm=matched, factors=factors)
            for name in (UP, DOWN, "lm_head.weight"):

                def keep(rank, end=end):
                    k = math.ceil(round(percent * rank / 100, 9))
                    return slice(0, k) if end == "top" else slice(rank - k, rank)

                expected = by_svd(base, tuned, name, keep, matched)
                np.testing.assert_allclose(
                    found[name], expected, rtol=0, atol=2e-6, err_msg=f"{name} {again}"
                )
            np.testing.assert_array_equal(found[NORM], tuned[NORM])  # a vector
    if matched:
        for name in (UP, DOWN):
            norm = np.linalg.norm(found[name] - base[name])
            assert norm == pytest.approx(np.linalg.norm(tuned[name] - base[name]), rel=1e-5)


def test_rank_five_keeps_five_components_whole(pair):
    base, tuned = pair[0], dict(pair[1])
    u, s, vt = np.linalg.svd(tuned[UP] - base[UP], full_matrices=False)
    tuned[UP] = base[UP] + (u[:, :5] * s[:5]) @ vt[:5]
    found = analysis.truncate(base, tuned, bottom=20)  # the fifth, not what rounding left behind
    update = np.linalg.svd(found[UP] - base[UP], compute_uv=False)
    assert update[0] == pytest.approx(s[4], rel=1e-4) and update[1] < 1e-5


def test_nothing_kept_is_the_base_with_the_vectors(pair):
    base, tuned = pair
    found = analysis.truncate(base, tuned, top=0)
    expected = {n: base[n] if tuned[n].ndim == 2 else tuned[n] for n in base}
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0, 0.8, 1.2])
def test_norms_are_scaled_as_by_hand(dtype, beta):
    base, early, final = tensors(0, dtype), tensors(1, dtype), tensors(2, dtype, 3.0)
    early[DOWN] = base[DOWN]  # has no direction
    wide = [{n: v.astype(np.float32) for n, v in tree.items()} for tree in (base, early, final)]
    found = analysis.match_norms(base, early, final, beta)
    for name in base:
        dw, dw_final = wide[1][name] - wide[0][name], wide[2][name] - wide[0][name]
        e, f = (float(np.linalg.norm(x.astype(np.float64))) for x in (dw, dw_final))
        expected = base[name]
        if name != DOWN:
            expected = (wide[0][name] + (1 + beta * (f - e) / e) * dw).astype(dtype) if beta else early[name]
        assert found[name].tobytes() == expected.tobytes(), name
    if dtype == np.float32:
        ones = analysis.match_norms(base, early, final, 1)
        norm = np.linalg.norm(ones[UP] - base[UP])
        assert norm == pytest.approx(np.linalg.norm(final[UP] - base[UP]), rel=1e-5)


def test_modules_are_left_out(pair):
    base, tuned = pair
    members = {
        "q": ["self_attn.q_proj"],
        "mlp": ["mlp.up_proj", "mlp.down_proj"],
        "attention": ["self_attn.q_proj", "self_attn.k_proj"],
        "other": ["model.norm", "input_layernorm"],
    }
    for module, words in members.items():
        expected = {n: base[n] if any(word in n for word in words) else tuned[n] for n in base}
        assert_bits(analysis.leave_out(base, tuned, module), expected)
    known = ("q", "k", "up", "down", "embedding", "head", "attention", "mlp", "other")
    assert _trees.groups(base) == known


def test_a_norm_before_the_mlp_is_no_attention():
    assert _trees.labels("model.layers.0.post_attention_layernorm.weight") == {"other"}
    assert _trees.labels("model.layers.0.self_attn.q_norm.weight") == {"other"}
    assert _trees.labels("model.layers.0.self_attn.q_proj.bias") == {"q", "attention"}


def test_a_decoder_and_its_folder_are_edited_alike(tmp_path, make_model):
    decoders = [make_model(seed) for seed in (0, 1)]
    folders = []
    for i, model in enumerate(decoders):
        models.save(model, tmp_path / str(i))
        folders.append(load_file(tmp_path / str(i) / "model.safetensors"))
    wanted = analysis.edits(*decoders, half_width=0)
    for mine, theirs in zip(wanted, analysis.edits(*folders, half_width=0), strict=True):
        assert mine.name == theirs.name and mine.content == theirs.content
        if mine.experiment in ("swap", "truncate") and mine.setting not in ("base", "top=10%,matched"):
            continue
        params = jax.tree.map(jnp.asarray, mine.make())
        models.save(nnx.merge(nnx.graphdef(decoders[0]), params), tmp_path / "edited")
        found, expected = load_file(tmp_path / "edited" / "model.safetensors"), theirs.make()
        for name in expected:
            np.testing.assert_allclose(
                found[name], expected[name], atol=2e-6 * (mine.experiment == "truncate")
            )


def test_stacks_of_other_names():
    base = {"params": {"blocks": {"up": np.zeros((2, 3, 4, 5), np.float32)}}, "step": np.int32(3)}
    rng = np.random.default_rng(0)
    tuned = jax.tree.map(lambda a: a if a.ndim == 0 else rng.normal(size=a.shape).astype(np.float32), base)
    found = analysis.truncate(base, tuned, top=25)
    ranks = np.linalg.matrix_rank(found["params"]["blocks"]["up"], tol=1e-5)
    assert ranks.shape == (2, 3) and (ranks == 1).all() and found["step"] == 3
    with pytest.raises(ValueError, match="tells a layer"):
        analysis.inject(base, tuned, [0])


def adapted(make_model):
    model = models.add_lora(make_model(0), rank=2, alpha=4, targets=("q",), key=jax.random.key(0))
    adapter = model.layers.attention.q.adapter
    adapter.lora_b.set_value(jax.random.normal(jax.random.key(1), adapter.lora_b.shape))
    return model


def test_adapters_are_merged_or_refused(make_model):
    base, tuned = make_model(0), adapted(make_model)
    found = analysis.scale(base, tuned, 1)
    merged = nnx.state(models.merge_lora(tuned), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, found, merged)
    with pytest.raises(ValueError, match=r"lora_a is of a LoRA adapter; merge it"):
        analysis.scale(nnx.state(base), nnx.state(tuned), 1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda b, t: analysis.scale(b, t, math.nan), "alpha must be a finite number, got nan"),
        (lambda b, t: analysis.scale(b, t, "1"), "alpha must be a finite number, got '1'"),
        (lambda b, t: analysis.scale(b, {n: t[n] for n in list(t)[1:]}, 1), "only the base has"),
        (lambda b, t: analysis.scale(b, t | {UP: t[UP][1:]}, 1), r"is \[24, 16\] in the base, \[23"),
        (lambda b, t: analysis.swap(b, t, "q"), "modules must be of"),
        (lambda b, t: analysis.swap({UP: b[UP]}, {UP: t[UP]}), "the model has no embedding or head"),
        (lambda b, t: analysis.inject(b, t, [0], "norm"), "'mlp' or 'attention', got 'norm'"),
        (lambda b, t: analysis.inject(b, t, [0, 2]), r"layers must be of 0 .. 1.*\[0, 2\]"),
        (lambda b, t: analysis.inject(b, t, []), "at least one, got"),
        (lambda b, t: analysis.window(0, -1, 4), "half-width must be an integer >= 0, got -1"),
        (lambda b, t: analysis.window(4, 1, 4), "0 .. 3, got 4"),
        (lambda b, t: analysis.truncate(b, t), "top or bottom, one of them"),
        (lambda b, t: analysis.truncate(b, t, top=1, bottom=1), "top or bottom, one of them"),
        (lambda b, t: analysis.truncate(b, t, top=101), "from 0 to 100, got 101"),
        (lambda b, t: analysis.truncate(b, t | {UP: t[UP] * np.nan}, top=1), "up_proj.* NaN"),
        (lambda b, t: analysis.match_norms(b, t, t, math.inf), "beta must be a finite"),
        (lambda b, t: analysis.leave_out(b, t, "gate"), "has no gate; it has q, k, up"),
        (lambda b, t: analysis.edits(b, t, experiments=["scales"]), "no experiment 'scales'; there"),
        (lambda b, t: analysis.edits(b, t, experiments=[]), "name an experiment"),
        (lambda b, t: analysis.edits(b, t, experiments=["norms"]), "needs an early checkpoint"),
        (lambda b, t: analysis.edits(b, t, alphas=[]), "alphas is empty"),
        (lambda b, t: analysis.edits(b, t, percents=[0]), "above 0 and at most 100, got 0"),
        (lambda b, t: analysis.edits(b, t, half_width=-2), "half-width must be an integer >= 0, got -2"),
        (lambda b, t: analysis.intervene(b, [], None, repeats=0), "repeats must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_what_is_refused(pair, call, match):
    with pytest.raises(ValueError, match=match):
        call(*pair)


def test_rows_average_repeats_before_prompts(pair):
    base, tuned = pair
    drawn, calls = np.random.default_rng(0).normal(size=(3, 8)), []

    def score(params, repeat):
        calls.append(repeat)
        return drawn[repeat] + np.linalg.norm(params[UP] - base[UP])

    known, shown = {}, []
    wanted = analysis.edits(base, tuned, experiments=["scale", "leave-out"], alphas=[0, 1])
    how = dict(repeats=3, known=known)
    tables = analysis.intervene(base, wanted, score, progress=lambda *a: shown.append(a), **how)
    assert list(tables) == ["scale", "leave-out"] and shown[0][1:] == (0, 33) and shown[-1][1:] == (33, 33)
    row, again = tables["scale"][1], tables["leave-out"][1]
    size = math.sqrt(sum(np.linalg.norm((tuned[n] - base[n]).astype(np.float64)) ** 2 for n in base))
    assert row["setting"] == "alpha=1" and row["norm"] == pytest.approx(size)
    assert again["setting"] == "tuned" and again["score"] == row["score"]  # evaluated once
    values = drawn.mean(0) + np.linalg.norm(tuned[UP] - base[UP])
    assert row["score"] == pytest.approx(values.mean())
    assert row["error"] == pytest.approx(values.std(ddof=1) / math.sqrt(8))
    assert len(calls) == 33
    assert analysis.intervene(base, wanted, score, **how) == tables and len(calls) == 33
    with pytest.raises(ValueError, match="not always as many"):
        analysis.intervene(base, wanted[:1], lambda *_: np.zeros(3), known=dict(known), repeats=4)


def test_a_single_number_has_an_error_over_repeats(pair):
    wanted = analysis.edits(*pair, experiments="swap")
    (row, *_) = analysis.intervene(pair[0], wanted, lambda _, repeat: float(repeat), repeats=3)["swap"]
    assert row["score"] == 1 and row["error"] == pytest.approx(1 / math.sqrt(3))
