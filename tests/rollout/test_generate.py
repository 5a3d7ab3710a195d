"""What a completion depends on, when it ends, and whether its log-probs are the model's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from opd_jax.models._protocol import unembed
from opd_jax.parallel import make_mesh, param_shardings
from opd_jax.rollout import Rollout, Sampling, _generate, bucket, generate
from opd_jax.training._step import completion_states

pytestmark = pytest.mark.usefixtures("quick_compilation")

V, B, N = 32, 8, 40
NEVER = (-1,)  # a stop token that no model emits; one stop id everywhere means one compiled program
KEY = jax.random.key(11)


class Letters:
    """A tokenizer: token i is one letter, so that places in the text are places in the completion."""

    def decode(self, ids):
        return "".join(chr(ord("A") + i) for i in ids)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n).tolist() for n in (3, 16, 1, 7, 12, 5, 9, 2)]


@pytest.fixture(scope="module")
def free(model, prompts):
    """A rollout in which nothing stops."""
    return host(generate(model, prompts, KEY, max_new_tokens=N, stop_token_ids=NEVER))


def host(rollout: Rollout) -> Rollout:
    return jax.tree.map(np.asarray, rollout)


def forward_logits(model, rollout) -> np.ndarray:
    """Logits that predict each completion token [B, N, V], from one causal pass over the packed rows."""
    rows, width = len(rollout.prompts), rollout.prompts.shape[1] + rollout.completions.shape[1]
    packed = np.full((rows, width), V - 1, np.int32)
    for row, prompt, length, completion, mask in zip(packed, *rollout[:4], strict=True):
        tokens = np.concatenate([prompt[:length], completion[mask]])
        row[: len(tokens)] = tokens
    graphdef, params = nnx.split(model)
    logits = np.asarray(jax.jit(lambda p, t: nnx.merge(graphdef, p)(t)[0])(params, packed))
    places = rollout.prompt_lengths[:, None] - 1 + np.arange(rollout.completions.shape[1])
    return np.take_along_axis(logits, places[..., None], axis=1)


def chosen(log_probs, rollout):
    got = np.take_along_axis(log_probs, rollout.completions[..., None], axis=-1)[..., 0]
    return np.where(rollout.mask, got, 0)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    with np.errstate(divide="ignore"):
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def same(a: Rollout, b: Rollout, rows=slice(None)):
    """Equal tokens and ends; log-probs to rounding."""
    np.testing.assert_array_equal(a.completions, b.completions[rows])
    np.testing.assert_array_equal(a.mask, b.mask[rows])
    np.testing.assert_array_equal(a.finish, b.finish[rows])
    np.testing.assert_allclose(a.log_probs, b.log_probs[rows], atol=1e-5)
    np.testing.assert_allclose(a.sampled_log_probs, b.sampled_log_probs[rows], atol=1e-5)


def test_layout(free, prompts):
    assert free.prompts.shape == (B, 16) and free.completions.shape == (B, N)
    assert [a.dtype for a in free] == ["int32", "int32", "int32", "bool", "float32", "float32", "int8"]
    for row, prompt, length in zip(free.prompts, prompts, free.prompt_lengths, strict=True):
        assert row[:length].tolist() == prompt and not row[length:].any()
    assert free.mask.all() and not free.finish.any()
    assert free.finish_reasons == ["length"] * B and free.lengths.tolist() == [N] * B
    assert ((free.completions >= 0) & (free.completions < V)).all()


def test_log_probs_are_those_of_a_full_forward_pass(model, free):
    expected = log_softmax(forward_logits(model, free))
    np.testing.assert_allclose(free.log_probs, chosen(expected, free), atol=1e-5)
    np.testing.assert_array_equal(free.log_probs, free.sampled_log_probs)


def test_training_sees_the_same_log_probs(model, free):
    """The trainer's packing and numerics: this difference is what a run logs."""
    hidden = completion_states(model, *(jnp.asarray(a) for a in free[:3]))
    log_probs = jax.nn.log_softmax(unembed(model, hidden))
    np.testing.assert_allclose(free.log_probs, chosen(np.asarray(log_probs), free), atol=1e-5)


def test_truncated_law(model, prompts):
    sampling = Sampling(temperature=0.8, top_k=6, top_p=0.9, min_p=0.02)
    got = host(generate(model, prompts, KEY, max_new_tokens=N, stop_token_ids=NEVER, sampling=sampling))
    logits = forward_logits(model, got)
    law = log_softmax(logits) / 0.8
    law = log_softmax(np.where(law >= np.sort(law, -1)[..., -6:-5], law, -np.inf))
    order = np.sort(law, -1)[..., ::-1]
    count = (np.cumsum(np.exp(order), -1) < 0.9).sum(-1, keepdims=True)
    law = log_softmax(np.where(law >= np.take_along_axis(order, count, -1), law, -np.inf))
    law = log_softmax(np.where(law >= law.max(-1, keepdims=True) + np.log(0.02), law, -np.inf))
    np.testing.assert_allclose(got.sampled_log_probs, chosen(law, got), atol=2e-5)
    np.testing.assert_allclose(got.log_probs, chosen(log_softmax(logits), got), atol=1e-5)
    assert (got.sampled_log_probs - got.log_probs > 0.01).any()


def test_greedy(model, prompts):
    got = host(generate(model, prompts, KEY, max_new_tokens=N, sampling=Sampling(temperature=0)))
    logits = forward_logits(model, got)
    np.testing.assert_array_equal(got.completions, logits.argmax(-1))
    assert not got.sampled_log_probs.any()
    np.testing.assert_allclose(got.log_probs, log_softmax(logits).max(-1), atol=1e-5)


def test_frequencies_of_two_tokens(model):
    """Many completions of one prompt against the exact law of the first token and of the second."""
    prompt, rows = [4, 9, 1], 4096
    first = log_softmax(model.logits(jnp.array([prompt]))[0, -1])
    second = log_softmax(model.logits(jnp.array([[*prompt, t] for t in range(V)]))[:, -1])
    got = host(generate(model, [prompt] * rows, KEY, max_new_tokens=2))
    laws = np.exp(first), np.exp(first) @ np.exp(second)
    for tokens, law in zip(got.completions.T, laws, strict=True):
        seen, usual = np.bincount(tokens, minlength=V), law * rows > 5
        seen, expected = seen[usual], law[usual] * rows
        assert usual.sum() > V // 2 and rows - expected.sum() < 40
        statistic = ((seen - expected) ** 2 / expected).sum()
        assert stats.chi2.sf(statistic, len(seen)) > 1e-4
    # And the two are drawn with different randomness.
    repeats = np.mean(got.completions[:, 0] == got.completions[:, 1])
    expected = np.exp(first) @ np.exp(np.diag(second))
    assert abs(repeats - expected) < 5 * np.sqrt(expected * (1 - expected) / rows)


def test_a_row_does_not_depend_on_its_place(model, prompts, free):
    order = np.random.default_rng(1).permutation(B)
    shuffled = [prompts[i] for i in order]
    got = generate(model, shuffled, KEY, max_new_tokens=N, stop_token_ids=NEVER, row_ids=order)
    same(host(got), free, order)


def test_a_row_does_not_depend_on_batch_padding_or_limit(model, prompts, free):
    """Alone with one other, in a bucket four times as wide, with half the length."""
    got = host(
        generate(
            model,
            [prompts[6], prompts[1]],
            KEY,
            max_new_tokens=N // 2,
            stop_token_ids=NEVER,
            prompt_bucket=64,
            row_ids=[6, 1],
        )
    )
    assert got.prompts.shape == (2, 64)
    half = free._replace(
        completions=free.completions[:, : N // 2],
        mask=free.mask[:, : N // 2],
        log_probs=free.log_probs[:, : N // 2],
        sampled_log_probs=free.sampled_log_probs[:, : N // 2],
    )
    same(got, half, [6, 1])


def test_padding_tokens_are_not_seen(model, free):
    padded = np.where(np.arange(16) < free.prompt_lengths[:, None], free.prompts, 23)
    got = generate(
        model, padded, KEY, prompt_lengths=free.prompt_lengths, max_new_tokens=N, stop_token_ids=NEVER
    )
    same(host(got), free)
    np.testing.assert_array_equal(got.prompts, padded)


def test_keys_and_row_ids_matter(model, prompts, free):
    run = dict(max_new_tokens=N, stop_token_ids=NEVER)
    other = host(generate(model, prompts, jax.random.key(12), **run))
    assert (other.completions != free.completions).any(-1).all()
    equal = host(generate(model, [prompts[0]] * B, KEY, row_ids=[3] * 4 + [2**32 - 1] * 4, **run))
    assert (equal.completions[:4] == equal.completions[0]).all()
    assert (equal.completions[4:] == equal.completions[4]).all()
    assert (equal.completions[0] != equal.completions[4]).any()


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((1, 8, 1), 8), ((2, 2, 2), 8), ((1, 4, 2), 6)],
    ids=["fsdp", "all", "rows do not divide"],
)
def test_devices_do_not_matter(model, prompts, free, shape, rows):
    mesh = make_mesh(*shape)
    graphdef, params = nnx.split(model)
    params = jax.device_put(params, param_shardings(params, mesh))
    kernel = params["layers"]["mlp"]["gate"]["kernel"][...]
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
    got = generate(nnx.merge(graphdef, params), prompts[:rows], KEY, max_new_tokens=N, stop_token_ids=NEVER)
    spread = len(got.completions.sharding.device_set)
    assert spread == 8 and got.completions.sharding.is_fully_replicated == (rows == 6)
    same(host(got), free, slice(rows))


@pytest.fixture
def ended_at(monkeypatch):
    """Steps that the decode loop has run."""
    steps, finish = [], _generate._finish
    monkeypatch.setattr(
        _generate, "_finish", lambda state, *rest: steps.append(int(state.step)) or finish(state, *rest)
    )
    return steps


def cut(free: Rollout, lengths, finish) -> Rollout:
    """What `free` looks like when its rows end after `lengths` tokens."""
    mask = np.arange(N) < np.asarray(lengths)[:, None]
    keep = [np.where(mask, a, 0) for a in (free.completions, free.log_probs, free.sampled_log_probs)]
    return free._replace(
        completions=keep[0],
        mask=mask,
        log_probs=keep[1],
        sampled_log_probs=keep[2],
        finish=np.asarray(finish),
    )


def first_place(completions, tokens):
    """Index behind the first of `tokens` in each row, and whether there is one."""
    hit = np.isin(completions, tokens)
    return np.where(hit.any(-1), hit.argmax(-1) + 1, N), hit.any(-1)


def test_end_of_sequence(model, prompts, free):
    stop = int(free.completions[0, 5])
    lengths, found = first_place(free.completions, [stop])
    got = host(generate(model, prompts, KEY, max_new_tokens=N, stop_token_ids=[stop]))
    assert found.any() and not found.all()
    same(got, cut(free, lengths, found.astype(np.int8)))
    assert (got.completions[found, lengths[found] - 1] == stop).all()
    np.testing.assert_array_equal(got.lengths, lengths)
    assert got.finish_reasons == ["eos" if f else "length" for f in found]


def test_several_stop_tokens_and_an_early_end_of_the_loop(model, prompts, free, ended_at):
    stops = sorted(set(free.completions[:, 3].tolist()) | {int(free.completions[0, 0])})
    lengths, found = first_place(free.completions, stops)
    assert found.all() and lengths[0] == 1
    got = host(generate(model, prompts, KEY, max_new_tokens=N, stop_token_ids=stops))
    same(got, cut(free, lengths, found.astype(np.int8)))
    assert ended_at == [lengths.max()]


def by_text(free, strings, stop=-1):
    """Lengths and ends by a plain search: cut at the first stop token, then at the first stop string."""
    lengths, found = first_place(free.completions, [stop])
    finish = found.astype(np.int8)
    for row in range(B):
        text = Letters().decode(free.completions[row, : lengths[row]])
        ends = [text.find(s) + len(s) for s in strings if s in text]
        if ends:
            lengths[row], finish[row] = min(ends), 2
    return lengths, finish


def test_stop_strings_across_segments(model, prompts, free):
    """Row 0's string is completed by token 33, the second of the second segment."""
    texts = [Letters().decode(row) for row in free.completions]
    strings = [texts[0][29:34], texts[1][2:5], texts[2][:1] + texts[2][1], texts[3][-3:]]
    lengths, finish = by_text(free, strings)
    assert lengths[0] == 34 and lengths[2] == 2 and (finish == 2).sum() >= 4 and (finish == 0).any()
    got = host(
        generate(
            model,
            prompts,
            KEY,
            max_new_tokens=N,
            stop_token_ids=NEVER,
            stop_strings=strings,
            tokenizer=Letters(),
        )
    )
    same(got, cut(free, lengths, finish))
    assert got.finish_reasons[0] == "stop" and got.finish_reasons[3] == "stop"


def test_the_earlier_of_stop_string_and_stop_token_ends_a_row(model, prompts, free):
    stop = int(free.completions[0, 20])
    before = first_place(free.completions, [stop])[0][0] - 4
    strings = [Letters().decode(free.completions[0, before : before + 2])]
    after = Letters().decode(free.completions[1, 36:39])
    lengths, finish = by_text(free, [*strings, after], stop)
    assert finish[0] == 2
    got = generate(
        model,
        prompts,
        KEY,
        max_new_tokens=N,
        stop_token_ids=[stop],
        stop_strings=[*strings, after],
        tokenizer=Letters(),
    )
    same(host(got), cut(free, lengths, finish))
    assert 1 in finish


def test_stop_strings_end_the_loop(model, prompts, free, ended_at):
    """Every row ends at once: no second segment is run."""
    strings = sorted({Letters().decode(row[:1]) for row in free.completions})
    got = host(
        generate(
            model,
            prompts,
            KEY,
            max_new_tokens=N,
            stop_token_ids=NEVER,
            stop_strings=strings,
            tokenizer=Letters(),
        )
    )
    assert (got.lengths == 1).all() and (got.finish == 2).all() and ended_at == [1]


def test_progress_changes_nothing(model, prompts, free):
    seen = []
    got = generate(model, prompts, KEY, max_new_tokens=N, stop_token_ids=NEVER, on_progress=seen.append)
    same(host(got), free)
    assert seen == sorted(seen) and seen and all(0 < n <= N for n in seen)


def test_nothing_is_compiled_twice(model, prompts, free, compilations):
    with compilations() as first:
        jax.jit(lambda x: x + 1.5)(1)
    assert len(first) == 1  # the counter counts
    stop = int(free.completions[0, 5])
    with compilations() as again:
        generate(model, prompts[::-1], jax.random.key(5), max_new_tokens=N, stop_token_ids=[stop])
        generate(model, [[1]] * B, KEY, max_new_tokens=N, stop_token_ids=[3], row_ids=range(50, 50 + B))
        generate(model, prompts, KEY, max_new_tokens=N, stop_token_ids=NEVER, on_progress=lambda n: None)
        generate(
            model,
            prompts,
            KEY,
            max_new_tokens=N,
            stop_token_ids=NEVER,
            stop_strings=["AB", "BA"],
            tokenizer=Letters(),
        )
    assert not again


def test_changed_parameters_are_used_without_compiling(model, make_model, prompts, free, compilations):
    graphdef, _ = nnx.split(model)
    _, params = nnx.split(make_model(seed=1))
    with compilations() as again:
        got = generate(nnx.merge(graphdef, params), prompts, KEY, max_new_tokens=N, stop_token_ids=NEVER)
    assert not again and (np.asarray(got.completions) != free.completions).any()


def test_a_model_with_the_bare_protocol(bare_model, prompts):
    model = bare_model
    got = host(generate(model, prompts, KEY, max_new_tokens=N))
    expected = log_softmax(forward_logits(model, got))
    np.testing.assert_allclose(got.log_probs, chosen(expected, got), atol=1e-5)
    alone = host(generate(model, prompts[3:4], KEY, max_new_tokens=N, row_ids=[3], prompt_bucket=8))
    same(alone, got, slice(3, 4))


def test_one_new_token(model, prompts, free):
    stop = int(free.completions[2, 0])
    got = host(generate(model, prompts, KEY, max_new_tokens=1, stop_token_ids=[stop]))
    np.testing.assert_array_equal(got.completions, free.completions[:, :1])
    np.testing.assert_array_equal(got.finish, free.completions[:, 0] == stop)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=[]), "no prompts"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1] * 20], prompt_bucket=16), "prompt 0 has 20 tokens, more than its bucket of 16"),
        (dict(prompts=[[1]], max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(prompts=[[1]], stop_strings=["x"]), "stop_strings need a tokenizer"),
        (dict(prompts=[[1]], stop_strings=[""], tokenizer=Letters()), "a stop string is empty"),
        (dict(prompts=[[1]], row_ids=[1, 2]), r"row_ids has shape \(2,\), expected \(1,\)"),
        (dict(prompts=[[1, 2]], prompt_lengths=[1, 2]), "prompts must be one"),
        (dict(prompts=np.ones((2, 4), int), prompt_lengths=[1, 5]), "prompt 1 has 5 tokens"),
        (dict(prompts=np.ones((2, 4), int), prompt_lengths=[1, 0]), "prompt 1 is empty"),
    ],
)
def test_wrong_input(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model, key=KEY, **dict(max_new_tokens=4) | arguments)


def test_bucket():
    assert [bucket(n) for n in (0, 1, 16, 17, 64, 65)] == [16, 16, 16, 32, 64, 128]
    assert bucket(3, smallest=1) == 4
