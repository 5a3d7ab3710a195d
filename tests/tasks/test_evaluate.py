import itertools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from opd_jax import rollout
from opd_jax.models import Decoder, DecoderConfig
from opd_jax.tasks import Prompts, arithmetic, encode_completion, evaluate, pass_at_k


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic.make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    config = DecoderConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=len(tokenizer),
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_width=8,
        ff_width=16,
        rope_theta=1e4,
        norm_epsilon=1e-6,
        qk_norm=True,
        tie_embeddings=False,
        max_length=64,
    )
    return Decoder(config, rngs=nnx.Rngs(0))


def make(tokenizer, size=7, **options):
    return Prompts(arithmetic.make(size=size), tokenizer, batch_size=4, max_prompt_length=16, **options)


@pytest.fixture
def fake(monkeypatch, tokenizer):
    """Answers as `fake.answer(example index, sample)` says; notes the calls."""

    class Fake:
        samples = 1
        calls = []  # noqa: RUF012
        texts = staticmethod(lambda index, sample: ">")

        def generate(self, model, prompts, key, *, prompt_lengths, max_new_tokens, row_ids, **rest):
            self.calls.append((prompts, prompt_lengths, np.asarray(row_ids), rest))
            completions = np.zeros((len(row_ids), max_new_tokens), np.int32)
            mask = np.zeros_like(completions, bool)
            for i, row in enumerate(row_ids):
                ids = encode_completion(tokenizer, self.texts(*divmod(int(row), self.samples)))
                ids = ids[:max_new_tokens]
                completions[i, : len(ids)], mask[i, : len(ids)] = ids, True
            zeros = np.zeros(mask.shape, np.float32)
            finish = (completions == tokenizer.eos_token_id).any(1).astype(np.int8)
            return rollout.Rollout(prompts, prompt_lengths, completions, mask, zeros, zeros, finish)

    fake = Fake()
    fake.calls = []
    monkeypatch.setattr(rollout, "generate", fake.generate)
    return fake


def test_accuracy_and_standard_error(fake, tokenizer):
    task = arithmetic.make(size=7)
    right = [1, 1, 0, 0, 1, 0, 0]
    fake.texts = lambda i, s: task[i].completion if right[i] else ">"
    result = evaluate(None, make(tokenizer), key=jax.random.key(0), max_new_tokens=32)
    assert result.accuracy == pytest.approx(3 / 7)
    assert result.standard_error == pytest.approx(np.std(right, ddof=1) / np.sqrt(7))
    assert result.pass_at_k[1] == (pytest.approx(3 / 7), pytest.approx(result.standard_error))
    assert [r.reward for r in result.records] == right
    assert result.truncated == 0
    lengths = [len(task[i].completion) + 1 if right[i] else 2 for i in range(7)]
    assert result.mean_length == pytest.approx(np.mean(lengths))
    first = result.records[0]
    assert first.prompt == "<bos>" + task[0].prompt and first.completion == task[0].completion
    assert first.example == task[0] and first.finish == "eos"


def test_batches_have_one_shape_and_rows_their_own_ids(fake, tokenizer):
    fake.samples = 3
    seen = []
    result = evaluate(
        None,
        make(tokenizer, size=5),
        key=jax.random.key(0),
        max_new_tokens=8,
        samples=3,
        batch_size=4,
        on_progress=lambda *args: seen.append(args),
    )
    assert {call[0].shape for call in fake.calls} == {(4, 16)}
    rows = np.concatenate([call[2] for call in fake.calls])
    assert rows.tolist() == [*range(15), 14]
    assert len(result.records) == 15
    assert seen == [(4, 15, 0.0), (8, 15, 0.0), (12, 15, 0.0), (15, 15, 0.0)]
    assert fake.calls[0][3]["stop_token_ids"] == (tokenizer.eos_token_id,)


def test_samples_of_a_prompt_are_not_independent_evidence(fake, tokenizer):
    # Each prompt is answered always or never: more samples must not shrink the error.
    task = arithmetic.make(size=7)
    fake.texts = lambda i, s: task[i].completion if i % 2 else ">"
    errors = []
    for fake.samples in (1, 4):
        result = evaluate(
            None,
            make(tokenizer),
            key=jax.random.key(0),
            max_new_tokens=32,
            samples=fake.samples,
            pass_k=(1, fake.samples),
        )
        assert result.accuracy == pytest.approx(3 / 7)
        assert all(value == pytest.approx(3 / 7) for value, _ in result.pass_at_k.values())
        errors.append(result.standard_error)
    assert errors[0] == pytest.approx(errors[1])


def test_pass_at_k_is_the_mean_over_subsets():
    for n, k in ((4, 2), (5, 1), (6, 6), (7, 3)):
        for c in range(n + 1):
            correct = np.arange(n) < c
            subsets = [correct[list(s)].any() for s in itertools.combinations(range(n), k)]
            assert pass_at_k(n, np.array([c]), k)[0] == pytest.approx(np.mean(subsets))
    with pytest.raises(ValueError, match="pass@5 needs"):
        pass_at_k(4, np.array([1]), 5)


def test_truncation(fake, tokenizer):
    task = arithmetic.make(size=7)
    fake.texts = lambda i, s: task[i].completion
    result = evaluate(None, make(tokenizer), key=jax.random.key(0), max_new_tokens=4)
    assert result.truncated == 1 and result.accuracy == 0 and result.mean_length == 4
    assert {r.finish for r in result.records} == {"length"}


def test_the_order_of_the_prompts_is_no_matter(fake, tokenizer):
    shuffled = evaluate(None, make(tokenizer, seed=5), key=jax.random.key(0), max_new_tokens=8)
    assert [r.example for r in shuffled.records] == list(arithmetic.make(size=7))


def test_context_shows_what_the_teacher_sees(fake, tokenizer):
    prompts = make(tokenizer, context_template="{prompt}{answer}")
    result = evaluate(None, prompts, key=jax.random.key(0), max_new_tokens=8, context=True)
    example = result.records[0].example
    assert result.records[0].prompt == f"<bos>{example.prompt}{example.answer}"
    with pytest.raises(ValueError, match="context_template"):
        evaluate(None, make(tokenizer), key=jax.random.key(0), max_new_tokens=8, context=True)


def test_errors(fake, tokenizer, monkeypatch):
    prompts = make(tokenizer)

    def run(**options):
        return evaluate(None, prompts, key=jax.random.key(0), max_new_tokens=8, **options)

    with pytest.raises(ValueError, match="pass@4 needs 1 <= k <= samples, and samples is 2"):
        run(samples=2, pass_k=(1, 4))
    with pytest.raises(ValueError, match="samples must be at least 1"):
        run(samples=0)
    for reward in (2.0, math.nan):
        monkeypatch.setattr(prompts.task, "verify", lambda c, e, r=reward: r)
        with pytest.raises(ValueError, match="not within"):
            run()


def test_one_prompt_has_no_standard_error(fake, tokenizer):
    result = evaluate(None, make(tokenizer, size=1), key=jax.random.key(0), max_new_tokens=8)
    assert math.isnan(result.standard_error)


def test_a_real_model_does_not_see_the_batch_size(model, tokenizer):
    def run(batch_size):
        return evaluate(
            model,
            make(tokenizer),
            key=jax.random.key(1),
            max_new_tokens=8,
            samples=2,
            batch_size=batch_size,
        )

    def completions(result):
        return [record.completion for record in result.records]

    assert len(set(completions(run(4)))) > 1
    assert completions(run(4)) == completions(run(14))


def test_a_real_model_compiles_once(model, tokenizer, caplog):
    prompts = make(tokenizer)
    evaluate(model, prompts, key=jax.random.key(1), max_new_tokens=8)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        evaluate(model, prompts, key=jax.random.key(2), max_new_tokens=8)
    assert not [r for r in caplog.records if "ompiling" in r.getMessage()]
