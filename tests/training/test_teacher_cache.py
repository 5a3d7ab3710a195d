"""The cached teacher against plain forward passes, and its folder against interruptions and damage."""

import functools
import itertools
import json
import re
from importlib.resources import files

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opd_jax import losses, models
from opd_jax.models._layers import ONE_HOT_VOCABULARY
from opd_jax.parallel import batch_sharding, make_mesh, param_shardings
from opd_jax.tasks import Example, PromptBatch, Prompts
from opd_jax.training import _cache_shards, _teacher_cache
from opd_jax.training._teacher_cache import TeacherCache, make_cache_score, tokenizer_fingerprint, write_cache

pytestmark = pytest.mark.usefixtures("quick_compilation")

V, B, P, N, K = 32, 4, 8, 6, 5
COUNT = 14  # examples: three batches and a short one


@functools.cache
def dataset(seed=0):
    """Random examples (prompt, completion) by id."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(100)[:COUNT]
    lengths = zip(rng.integers(1, P + 1, COUNT), rng.integers(1, N + 1, COUNT), strict=True)
    return {
        int(i): (rng.integers(0, V, n), rng.integers(0, V, m)) for i, (n, m) in zip(ids, lengths, strict=True)
    }


def batch_of(ids, data=None, width=N):
    rows = [(data or dataset())[i] for i in ids]
    lengths = [np.array([len(row[side]) for row in rows], np.int32) for side in (0, 1)]
    tokens = []
    for side, size in ((0, P), (1, width)):
        tokens.append(np.zeros((len(rows), size), np.int32))
        for row, values in zip(tokens[-1], rows, strict=True):
            row[: len(values[side])] = values[side]
    return PromptBatch(
        tuple(Example("") for _ in ids), np.array(ids, np.int64), tokens[0], lengths[0],
        completions=tokens[1], completion_lengths=lengths[1],
    )  # fmt: skip


def batches(ids=None, data=None):
    ids = ids or list(dataset())
    for first in range(0, len(ids), B):
        yield batch_of(ids[first : first + B], data)


@pytest.fixture(scope="module", autouse=True)
def one_compilation():
    """Every call of `write_cache` makes its own jitted function; here equal ones are compiled once."""
    patch = pytest.MonkeyPatch()
    made = functools.cache(make_cache_score)
    patch.setattr(_teacher_cache, "make_cache_score", made)
    yield made
    patch.undo()


@pytest.fixture(scope="module")
def teacher(make_model):
    return make_model(1)


def write(folder, teacher, source=None, **options):
    settings = dict(top_k=K, tokenizer="abc", teacher="a teacher", loss_chunk=10) | options
    return write_cache(folder, model=teacher, batches=batches() if source is None else source, **settings)


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    return write(tmp_path_factory.mktemp("cache"), teacher, max_shard_bytes=600)


@pytest.fixture(scope="module")
def truth(teacher):
    """The teacher's log-probs [n, V] of each example's completion, from plain rows in float64."""
    forward = jax.jit(lambda tokens: teacher(tokens)[0])
    found = {}
    for i, (prompt, completion) in dataset().items():
        row = np.zeros((1, P + N), np.int32)
        row[0, : len(prompt) + len(completion)] = np.concatenate([prompt, completion])
        logits = np.asarray(forward(row)[0], np.float64)[len(prompt) - 1 :][: len(completion)]
        logits -= logits.max(-1, keepdims=True)
        found[i] = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


def test_holds_what_the_teacher_says(cache, truth):
    assert len(cache) == COUNT and cache.ids.tolist() == sorted(truth) and cache.teacher == "a teacher"
    assert len(list(cache.folder.glob("*.safetensors"))) > 3  # several shards
    for batch in batches():
        got = cache.lookup(batch)
        assert [a.dtype for a in got] == [np.int32, np.float32, np.float32]
        assert got.support.shape == got.log_probs.shape == (len(batch.ids), N, K)
        for i, n, support, log_probs, tail in zip(batch.ids, batch.completion_lengths, *got, strict=True):
            wanted = truth[int(i)]
            np.testing.assert_array_equal(support[:n], np.argsort(-wanted, axis=-1, kind="stable")[:, :K])
            np.testing.assert_allclose(
                log_probs[:n], np.take_along_axis(wanted, support[:n], axis=-1), atol=1e-5
            )
            rest = np.exp(wanted)
            np.put_along_axis(rest, support[:n], 0, axis=-1)
            np.testing.assert_allclose(tail[:n], np.log(rest.sum(-1)), atol=1e-5)
        # Padding, too, is a law over K + 1 categories.
        np.testing.assert_allclose(np.exp(got.categories).sum(-1), 1, atol=1e-6)
        assert got.categories.shape == (len(batch.ids), N, K + 1)


def test_is_the_teacher_of_the_top_k_loss(cache, truth):
    """Value and gradient are those of `top_k` with the whole teacher."""
    batch = batch_of(cache.ids[:B].tolist())
    got = cache.lookup(batch)
    mask = np.arange(N) < batch.completion_lengths[:, None]
    logits = jnp.asarray(np.random.default_rng(3).normal(0, 1, (B, N, V)), jnp.float32)
    whole = np.full((B, N, V), -np.log(V), np.float32)
    for row, i in zip(whole, batch.ids, strict=True):
        row[: len(truth[int(i)])] = truth[int(i)]
    support = losses.Support(got.support, np.ones(got.support.shape, bool))

    def cached(logits, divergence):
        student = losses.coarsen(jax.nn.log_softmax(logits), support)
        return divergence(student, got.categories, where=mask[..., None]).sum()

    def direct(logits, divergence):
        student = jax.nn.log_softmax(logits)
        return jnp.where(mask, losses.top_k(divergence, student, whole, support=support), 0).sum()

    for divergence in (losses.reverse_kl, losses.forward_kl):
        pair = [jax.jit(jax.value_and_grad(functools.partial(f, divergence=divergence)))(logits)
                for f in (cached, direct)]  # fmt: skip
        np.testing.assert_allclose(pair[0][0], pair[1][0], rtol=1e-5)
        np.testing.assert_allclose(pair[0][1], pair[1][1], atol=2e-6)
        assert not pair[0][1][~mask].any()


def test_random_access(cache):
    rng = np.random.default_rng(5)
    one = {int(i): cache[[i]] for i in cache.ids}
    for _ in range(4):
        ids = rng.choice(cache.ids, 6)  # any order, with repetitions
        got, wide = cache[ids], cache.lookup(batch_of(ids.tolist(), width=N + 3))
        assert wide.tail.shape == (6, N + 3)
        for row, i in enumerate(ids.tolist()):
            n = len(dataset()[i][1])
            for mine, all_of, padded in zip(one[i], got, wide, strict=True):
                np.testing.assert_array_equal(mine[0], all_of[row, :n])
                np.testing.assert_array_equal(mine[0], padded[row, :n])


def test_other_tokens_are_refused(cache):
    ids = cache.ids[:2].tolist()
    for side, change in itertools.product((0, 1), ("replaced", "longer", "shorter")):
        data = dict(dataset())
        pair = [a.copy() for a in data[ids[1]]]
        if change == "replaced":
            pair[side][-1] ^= 1
        elif (len(pair[side]) + 1 > min(P, N) and change == "longer") or len(pair[side]) < 2:
            continue
        else:
            pair[side] = np.append(pair[side], 0) if change == "longer" else pair[side][:-1]
        data[ids[1]] = tuple(pair)
        with pytest.raises(ValueError, match=f"example {ids[1]} has other tokens"):
            cache.lookup(batch_of(ids, data))
    # A token moved from the prompt to the completion is not the same pair either.
    data = {7: (np.array([1, 2]), np.array([3])), 8: (np.array([1]), np.array([2, 3]))}
    a, b = _teacher_cache._hashes(batch_of([7, 8], data))
    assert a != b
    with pytest.raises(ValueError, match=r"example 1000 \(1 of these 2\) is not in"):
        cache[[ids[0], 1000]]


def test_context_is_what_the_teacher_sees(teacher, cache, tmp_path):
    ids = cache.ids[:B].tolist()
    plain = batch_of(ids)
    hidden = plain._replace(  # the student's prompts are others
        tokens=plain.tokens[:, ::-1].copy(), context_tokens=plain.tokens, context_lengths=plain.lengths
    )
    made = write(tmp_path, teacher, [hidden])
    np.testing.assert_allclose(made.lookup(hidden).tail, cache.lookup(plain).tail, atol=1e-6)
    with pytest.raises(ValueError, match="has other tokens"):
        made.lookup(hidden._replace(context_tokens=None, context_lengths=None))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [1, 3])
def test_resumes(teacher, cache, tmp_path, monkeypatch, error, after):
    def broken():
        yield from itertools.islice(batches(), after)
        raise error("stop")

    with pytest.raises(error):
        write(tmp_path, teacher, broken(), max_shard_bytes=600)
    with pytest.raises(ValueError, match="written last"):
        TeacherCache.open(tmp_path)
    (tmp_path / ".shard-00009.safetensors.part").write_bytes(b"half")
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard*")}
    scored, seen = [], []
    monkeypatch.setattr(_cache_shards.ShardWriter, "add", _counting(scored))
    made = write(tmp_path, teacher, max_shard_bytes=600, progress=lambda *a: seen.append(a))
    assert kept == {name: (tmp_path / name).stat().st_mtime_ns for name in kept}
    before = sum(len(_cache_shards.Shard(tmp_path, name).ids) for name in kept)
    assert len(scored) == COUNT - before and len(set(scored)) == len(scored)
    assert not list(tmp_path.glob(".*"))
    if error is KeyboardInterrupt:  # what had been scored was written
        assert before == (after - 1) * B
    assert seen[-1] == (COUNT, sum(len(c) for _, c in dataset().values())) and seen == sorted(seen)
    for batch in batches():
        for a, b in zip(made.lookup(batch), cache.lookup(batch), strict=True):
            np.testing.assert_array_equal(a, b)


def _counting(scored):
    add = _cache_shards.ShardWriter.add

    def counting(self, example, *rest):
        scored.append(example)
        add(self, example, *rest)

    return counting


def test_grows_and_ignores_repetitions(teacher, cache, tmp_path):
    ids = list(dataset())
    write(tmp_path, teacher, batches(ids[:8] + ids[:4]))
    (name,) = (path.name for path in tmp_path.glob("shard*"))
    time = (tmp_path / name).stat().st_mtime_ns
    assert len(TeacherCache.open(tmp_path)) == 8
    made = write(tmp_path, teacher)
    assert len(made) == COUNT and (tmp_path / name).stat().st_mtime_ns == time
    np.testing.assert_array_equal(made[ids].tail, cache[ids].tail)
    data = dict(dataset())
    data[ids[5]] = data[ids[6]]
    with pytest.raises(ValueError, match=f"example {ids[5]} is in .* with another prompt"):
        write(tmp_path, teacher, batches(ids, data))


def test_another_teacher_is_not_mixed_in(teacher, make_model, tmp_path):
    write(tmp_path, teacher, batches(list(dataset())[:B]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"made with weights \w+, not"):
        write(tmp_path, make_model(2), batches())
    with pytest.raises(ValueError, match="made with top_k 5, not 4"):
        write(tmp_path, teacher, batches(), top_k=4)
    with pytest.raises(ValueError, match="made with tokenizer abc, not other"):
        write(tmp_path, teacher, batches(), tokenizer="other")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_sizes_of_shards(cache):
    for path in cache.folder.glob("shard*"):
        shard = _cache_shards.Shard(cache.folder, path.name)
        assert len(shard.ids) == 1 or int(shard.offsets[-1]) * (8 * K + 4) <= 600


def test_open_checks_the_run(cache):
    folder = cache.folder
    fits = TeacherCache.open(folder, tokenizer="abc", vocab_size=V + 8, top_k=K, temperature=1.0)
    assert fits.top_k == K and fits.vocab_size == V
    for options, message in (
        ({"tokenizer": "abd"}, "made with tokenizer abc, this run has abd"),
        ({"vocab_size": V - 1}, f"vocabulary of {V} tokens, the student has {V - 1}"),
        ({"top_k": 8}, "made with top_k 5, this run has 8"),
        ({"temperature": 2.0}, "made with temperature 1.0, this run has 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            TeacherCache.open(folder, **options)


def copy(cache, folder):
    folder.mkdir()
    for path in cache.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return sorted(folder.glob("shard*"))


def test_damage(cache, teacher, tmp_path):
    shards = copy(cache, tmp_path / "cut")
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{shards[1].name} is truncated or changed: it has \d+ bytes"):
        TeacherCache.open(tmp_path / "cut")
    made = write(tmp_path / "cut", teacher, max_shard_bytes=600)  # mends it
    np.testing.assert_array_equal(made[cache.ids].tail, cache[cache.ids].tail)
    shards = copy(cache, tmp_path / "gone")
    shards[2].unlink()
    with pytest.raises(ValueError, match=rf"{shards[2].name} is missing"):
        TeacherCache.open(tmp_path / "gone")
    shards = copy(cache, tmp_path / "flipped")
    data = bytearray(shards[0].read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    where = json.loads(data[8:start])["log_probs"]["data_offsets"][0]
    data[start + where + 2] ^= 1
    shards[0].write_bytes(data)
    damaged = TeacherCache.open(tmp_path / "flipped")
    with pytest.raises(ValueError, match=r"is damaged \(checksum differs\)"):
        damaged[cache.ids]
    index = tmp_path / "flipped" / "index.json"
    for text in ("{", "[]", '{"format": 1}', index.read_text().replace('"format": 1', '"format": 2')):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json"):
            TeacherCache.open(tmp_path / "flipped")


def test_a_full_disk_keeps_what_is_there(teacher, tmp_path, monkeypatch):
    write_file = _cache_shards.write_atomic
    calls = itertools.count()

    def full(path, data):
        if next(calls) == 2:
            raise OSError(28, "No space left on device", str(path))
        write_file(path, data)

    monkeypatch.setattr(_cache_shards, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, teacher, max_shard_bytes=600)
    assert len(list(tmp_path.iterdir())) == 2
    assert len(write(tmp_path, teacher, max_shard_bytes=600)) == COUNT


def test_wrong_inputs(teacher, tmp_path):
    ids = list(dataset())[:B]
    for k, size in ((0, V), (V + 1, None), (5, 4), (5, V + 1)):
        with pytest.raises(ValueError, match="need 1 <= top_k <= vocab_size <= 32"):
            write(tmp_path, teacher, top_k=k, vocab_size=size)
    with pytest.raises(ValueError, match="no example"):
        write(tmp_path, teacher, [])
    batch = batch_of(ids)
    with pytest.raises(ValueError, match="give Prompts a max_completion_length"):
        write(tmp_path, teacher, [batch._replace(completions=None)])
    with pytest.raises(ValueError, match=f"the completion of example {ids[1]} is empty"):
        write(tmp_path, teacher, [batch._replace(completion_lengths=np.array([1, 0, 2, 2], np.int32))])
    state = nnx.state(teacher)
    broken = nnx.merge(nnx.graphdef(teacher), jax.tree.map(lambda a: a * jnp.nan, state))
    with pytest.raises(ValueError, match=f"example {ids[0]}: .* token 0 are not finite"):
        write(tmp_path, broken, [batch])
    with pytest.raises(ValueError, match="is no complete teacher cache"):
        TeacherCache.open(tmp_path)


def test_whole_vocabulary_and_temperature(teacher, truth, tmp_path):
    """K = V: nothing is left for the tail; the temperature and the shared vocabulary change the law."""
    ids = list(dataset())[:B]
    made = write(tmp_path, teacher, batches(ids), top_k=V - 2, vocab_size=V - 2, temperature=2.0)
    got = made.lookup(batch_of(ids))
    for i, support, log_probs, tail in zip(ids, *got, strict=True):
        law = np.exp(truth[i][:, : V - 2] / 2)
        law /= law.sum(-1, keepdims=True)
        found = np.zeros_like(law)
        np.put_along_axis(found, support[: len(law)], np.exp(log_probs[: len(law)]), axis=-1)
        np.testing.assert_allclose(found, law, atol=1e-5)
        assert (tail[: len(law)] == -np.inf).all()


def test_on_a_mesh(teacher, cache, tmp_path):
    """Three rows on two shards: padded, and the same numbers."""
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    graphdef, params = nnx.split(teacher)
    placed = nnx.merge(graphdef, jax.device_put(params, param_shardings(params, mesh)))
    ids = list(dataset())[:3]
    with jax.set_mesh(mesh):
        made = write(tmp_path, placed, batches(ids), sharding=batch_sharding(mesh))
    assert made.settings == cache.settings  # the weights are the same, wherever they are
    for a, b in zip(made[ids], cache[ids], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_logits_exist_for_a_chunk_only(make_model):
    vocabulary, chunk = ONE_HOT_VOCABULARY + 1, 8  # for fewer, the embedding is looked up by one-hot rows
    teacher = make_model(3, vocab_size=vocabulary)
    score = make_cache_score(nnx.graphdef(teacher), top_k=4, loss_chunk=chunk)
    batch = batch_of(list(dataset())[:B])
    rows = batch.tokens, batch.lengths, batch.completions
    program = score.lower(nnx.state(teacher), *rows).compile().as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\w+\[([\d,]+)\]", program)}
    logits = [int(np.prod(s)) for s in shapes if vocabulary in s and 16 not in s]  # 16: the embedding's width
    assert max(logits) == chunk * vocabulary < B * N * vocabulary


def test_demonstrations_of_a_task(tmp_path):
    """From a task to the loss's teacher, with the demo teacher: prompts, batches, cache."""

    class Sums(list):
        name = "sums"

    folder = files("opd_jax") / "demo" / "teacher"
    tokenizer, teacher = models.load_tokenizer(folder), models.load(folder)
    task = Sums(Example(f"{a}+{b}=", completion=f"{a + b}") for a in range(3) for b in range(3))
    prompts = Prompts(task, tokenizer, batch_size=4, max_prompt_length=16, max_completion_length=8)
    source = [prompts.take(range(first, min(first + 4, 9))) for first in range(0, 9, 4)]
    write_cache(tmp_path, model=teacher, batches=source, top_k=4, tokenizer=tokenizer)
    made = TeacherCache.open(tmp_path, tokenizer=tokenizer, vocab_size=teacher.config.vocab_size, top_k=4)
    assert len(made) == 9
    batch = prompts[1]
    got = made.lookup(batch)
    assert got.tail.shape == batch.completions.shape
    # All rows at once: of one row, the same forward pass differs by up to 3e-5 in this sharp model.
    rows = np.zeros((4, batch.tokens.shape[1] + batch.completions.shape[1]), np.int32)
    spans = [(n, n + m) for n, m in zip(batch.lengths, batch.completion_lengths, strict=True)]
    for row, prompt, completion, (n, end) in zip(rows, batch.tokens, batch.completions, spans, strict=True):
        row[:end] = np.concatenate([prompt[:n], completion[: end - n]])
    plain = np.asarray(jax.jit(lambda tokens: jax.nn.log_softmax(teacher(tokens)[0]))(rows))
    for support, log_probs, row, (n, end) in zip(*got[:2], plain, spans, strict=True):
        wanted = row[n - 1 : end - 1]
        np.testing.assert_array_equal(support[: end - n], np.argsort(-wanted, axis=-1)[:, :4])
        np.testing.assert_allclose(log_probs[: end - n], -np.sort(-wanted, axis=-1)[:, :4], atol=2e-5)
    vocabulary = tokenizer.get_vocab()
    swapped = dict(vocabulary, **{"1": vocabulary["2"], "2": vocabulary["1"]})
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(_Vocabulary(swapped))
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(
        _Vocabulary(dict(reversed(vocabulary.items())))
    )


class _Vocabulary:
    def __init__(self, vocabulary):
        self.get_vocab = lambda: vocabulary
