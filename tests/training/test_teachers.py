"""Where rollouts and teachers come from, end to end."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import opd_jax
from opd_jax import config as configs
from opd_jax import models, tasks, training
from opd_jax.training import _batches, _loop
from tests.training.runs import assert_same, read_metrics, read_weights

NO_TEACHER = configs.TeacherConfig()

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(scope="module")
def demo():
    """Sections of a config whose models write what belongs to the task."""
    folder = Path(opd_jax.__file__).parent / "demo"
    return dict(
        student=configs.StudentConfig(path=str(folder / "base")),
        teacher=configs.TeacherConfig(path=str(folder / "teacher")),
        optimizer=configs.OptimizerConfig(learning_rate=1e-4),
    )


def losses_of(settings) -> list[float]:
    training.train(settings)
    return [line["loss"] for line in read_metrics(settings.run_dir)]


@pytest.mark.slow
def test_a_mix_of_rollouts_and_demonstrations(make):
    """Which steps are on-policy depends on seed and step alone, also after a resume."""
    settings = make(lmbda=0.5, steps=6, max_new_tokens=32)
    training.train(settings)
    sampled = ["eos_rate" in line for line in read_metrics(settings.run_dir)]
    assert len(set(sampled)) == 2
    first = make("again", lmbda=0.5, steps=3, max_new_tokens=32)
    training.train(first)
    training.train(dataclasses.replace(first, steps=6))
    assert ["eos_rate" in line for line in read_metrics(first.run_dir)] == sampled
    assert_same(read_weights(Path(first.run_dir) / "model"), read_weights(Path(settings.run_dir) / "model"))


@pytest.mark.slow
def test_sequence_level_distillation_imitates_what_the_teacher_writes(make, demo, monkeypatch):
    """The completions are right as often as the teacher is (0.90), not as the student (0.41)."""
    right = []

    def spy(setup, *args):
        batch, metrics = make_batch(setup, *args)
        texts = tasks.decode(
            setup.tokenizer, [c[m] for c, m in zip(batch.completions, batch.mask, strict=True)]
        )
        examples = setup.prompts[0].examples
        right.extend(setup.prompts.task.verify(*pair) for pair in zip(texts, examples, strict=True))
        return batch, metrics

    make_batch = _loop.make_batch
    monkeypatch.setattr(_loop, "make_batch", spy)
    settings = make(objective="sft", off_policy="teacher", steps=1, batch_size=64, max_new_tokens=32, **demo)
    training.train(settings)
    (line,) = read_metrics(settings.run_dir)
    assert np.mean(right) > 0.75 and line["loss"] < 0.5 and "kl" not in line


@pytest.mark.slow
def test_an_averaged_teacher_is_saved_and_restored(make, folders):
    teacher = configs.TeacherConfig(path=folders[0], ema=0.5, context="{prompt}{answer}")
    whole = make("whole", teacher=teacher, steps=4)
    training.train(whole)
    stopped = make("stopped", teacher=teacher, steps=2)
    training.train(stopped)
    training.train(dataclasses.replace(stopped, steps=4))
    assert_same(read_weights(Path(whole.run_dir) / "model"), read_weights(Path(stopped.run_dir) / "model"))
    assert [a["kl"] for a in read_metrics(whole.run_dir)] == [a["kl"] for a in read_metrics(stopped.run_dir)]


def test_teachers_by_a_column_of_the_data(make, folders):
    """Two names for one teacher are that teacher; an unknown name is an error before any model is loaded."""
    both = {"addition": {"path": folders[1]}, "chain": {"path": folders[1]}}
    several = make("several", teacher=NO_TEACHER, teachers=both, data__teacher="kind", steps=2)
    np.testing.assert_allclose(losses_of(several), losses_of(make("one", steps=2)), rtol=1e-4)
    wrong = make("wrong", teacher=NO_TEACHER, teachers={"addition": both["chain"]}, data__teacher="kind")
    with pytest.raises(ValueError, match=r"kind = 'chain'.*none of the teachers addition"):
        training.train(wrong)


def test_dynamic_sampling_refills_with_informative_groups(make, monkeypatch):
    """Rewards that differ within some groups only: the batch holds these, as far as there are enough."""
    seen = []

    def rewards(setup, prompts, completions, mask):
        value = (prompts.ids % 3 == 0)[:, None] & (np.arange(2) == 0)
        return value.astype(np.float32).reshape(-1)

    original = _batches.jax.device_put
    monkeypatch.setattr(_batches, "_rewards", rewards)
    monkeypatch.setattr(_batches.jax, "device_put", lambda a, *b: (seen.append(a), original(a, *b))[1])
    dapo = dict(objective="grpo", samples_per_prompt=2, dynamic_sampling=6, aggregation="token")
    settings = make(**dapo, teacher=NO_TEACHER, steps=1)
    training.train(settings)
    (line,) = read_metrics(settings.run_dir)
    batch = next(a for a in seen if isinstance(a, _batches.Batch))
    groups = np.asarray(batch.advantages).reshape(4, 2, -1)[:, :, 0]
    assert 0 < line["constant_groups"] < 1 and 1 < line["sampling_rounds"] <= 7
    np.testing.assert_allclose(groups, [[np.sqrt(0.5), -np.sqrt(0.5)]] * 4, rtol=1e-4)
    assert np.asarray(batch.completions).shape == (8, 8)


@pytest.mark.slow
def test_a_teacher_with_another_tokenizer(make, demo, tmp_path):
    """With the same tokens it is plain distillation; so it is with other ids for the same characters."""
    sizes = dict(loss="sampled_reverse_kl", steps=2, batch_size=16, max_new_tokens=32)
    plain = losses_of(make("plain", **sizes, **demo))
    other = permuted(Path(demo["teacher"].path), tmp_path / "other")
    for name, path in dict(same=demo["teacher"].path, permuted=str(other)).items():
        teacher = configs.TeacherConfig(path=path, align=True)
        settings = make(name, **sizes, **demo | dict(teacher=teacher))
        np.testing.assert_allclose(losses_of(settings), plain, rtol=1e-3)
        assert all(line["aligned"] == 1 for line in read_metrics(settings.run_dir))


def permuted(source: Path, target: Path) -> Path:
    """The model with the ids of its characters reversed, which is the same law of text."""
    shutil.copytree(source, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    names = [name for name in sorted(vocab, key=vocab.get) if name not in special]
    moved = dict(zip([vocab[n] for n in names], [vocab[n] for n in reversed(names)], strict=True))
    tokenizer["model"]["vocab"] = {n: moved.get(i, i) for n, i in vocab.items()}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = safetensors.numpy.load_file(target / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = weights[name].copy()
        for before, after in moved.items():
            weights[name][after] = old[before]
    safetensors.numpy.save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_adapters(make, folders):
    """Only what is adapted changes; the folder is a whole model."""
    lora = configs.LoraConfig(rank=2, alpha=4.0, targets=("q", "down"))
    settings = make(lora=lora, steps=3)
    training.train(settings)
    before, after = (read_weights(Path(p)) for p in (folders[0], f"{settings.run_dir}/model"))
    changed = {name.split(".")[-2] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"q_proj", "down_proj"}
    for name in before:
        difference = after[name].astype(np.float64) - before[name]
        if changed & {name.split(".")[-2]}:
            assert np.linalg.matrix_rank(difference, tol=1e-4 * np.linalg.norm(difference, 2)) <= 2
    adapter = make("adapter", lora=dataclasses.replace(lora, save="adapter"), steps=3)
    result = training.train(adapter)
    assert json.loads((result.model / "adapter_config.json").read_text())["r"] == 2
    loaded = models.merge_lora(models.load_lora(models.load(folders[0]), result.model))
    whole, tokens = models.load(f"{settings.run_dir}/model"), np.arange(6)[None]
    np.testing.assert_allclose(loaded.logits(tokens), whole.logits(tokens), atol=1e-4)


def test_a_cached_teacher(make, demo, tmp_path):
    """What is cached and what a teacher in memory says give the same loss; other data is refused."""
    sizes = dict(loss="forward_kl", lmbda=0.0, steps=2, batch_size=16, max_new_tokens=32)
    k = 6
    live = make("live", **sizes, **demo, loss_top_k=k, loss_support="teacher")
    teacher = configs.TeacherConfig(path=demo["teacher"].path, cache=str(tmp_path / "cache"), cache_top_k=k)
    cached = make("cached", **sizes, **demo | dict(teacher=teacher))
    with pytest.raises(ValueError, match="no complete teacher cache"):
        training.train(cached)
    assert training.cache_teacher(cached) == tmp_path / "cache"
    np.testing.assert_allclose(losses_of(cached), losses_of(live), rtol=1e-4)
    other = dataclasses.replace(
        cached,
        run_dir=str(tmp_path / "o"),
        data=dataclasses.replace(cached.data, options=dict(seed=9, size=64)),
    )
    with pytest.raises(ValueError, match="other tokens than those the teacher scored"):
        training.train(other)
