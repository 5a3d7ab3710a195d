import numpy as np
import pytest
import tokenizers

from opd_jax.tasks import Example, Prompts, arithmetic


class Listed:
    name = "listed"

    def __init__(self, *examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    def verify(self, completion, example):
        return float(completion == example.answer)


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic.make_tokenizer()


def make(tokenizer, task=None, **options):
    task = arithmetic.make(size=10) if task is None else task
    return Prompts(task, tokenizer, **{"batch_size": 4, "max_prompt_length": 16, **options})


def test_batches(tokenizer):
    task = arithmetic.make(size=10)
    prompts = make(tokenizer, task)
    batch = prompts[0]
    assert (len(prompts), prompts.dropped, prompts.bucket) == (10, 0, 16)
    assert batch.tokens.shape == (4, 16) and batch.tokens.dtype == np.int32
    assert batch.lengths.dtype == np.int32 and batch.ids.dtype == np.int64
    assert batch.context_tokens is None and batch.completions is None
    for i, row, length, example in zip(batch.ids, batch.tokens, batch.lengths, batch.examples, strict=True):
        assert example == task[int(i)]
        assert row[:length].tolist() == tokenizer(example.prompt)["input_ids"]
        assert not row[length:].any()  # PAD is 0


def test_step_is_the_whole_position(tokenizer):
    prompts, again = make(tokenizer, seed=3), make(tokenizer, seed=3)
    order = [prompts[step].ids.tolist() for step in range(10)]
    assert [again[step].ids.tolist() for step in reversed(range(10))] == order[::-1]
    assert [make(tokenizer, seed=4)[s].ids.tolist() for s in range(10)] != order
    epochs = np.concatenate(order).reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all()  # each prompt once in every epoch
    assert len({tuple(epoch) for epoch in epochs}) == 4  # in another order
    with pytest.raises(IndexError, match="-1"):
        prompts[-1]


def test_seed_may_be_any_integer(tokenizer):
    assert make(tokenizer, seed=-1)[0].ids.shape == (4,)
    assert make(tokenizer, seed=2**40)[0].ids.shape == (4,)


def test_unshuffled(tokenizer):
    prompts = make(tokenizer, shuffle=False)
    assert prompts[0].ids.tolist() == [0, 1, 2, 3]
    assert prompts[2].ids.tolist() == [8, 9, 0, 1]


def test_too_long_is_dropped_and_counted_or_an_error(tokenizer):
    task = Listed(Example("1"), Example("1+2+3+4="), Example("2"))
    prompts = make(tokenizer, task, max_prompt_length=4)
    assert prompts.kept.tolist() == [0, 2] and prompts.dropped == 1 and len(prompts) == 2
    assert sorted(prompts[0].ids.tolist()) == [0, 0, 2, 2]
    with pytest.raises(ValueError, match=r"prompt of example 1 has 9 tokens, more than .* 4"):
        make(tokenizer, task, max_prompt_length=4, too_long="error")
    with pytest.raises(ValueError, match="none of the 3 examples of 'listed' fits"):
        make(tokenizer, task, max_prompt_length=1)


def test_teacher_context(tokenizer):
    prompts = make(tokenizer, context_template="{prompt}{answer}={completion}")
    batch = prompts[0]
    assert prompts.context_bucket == 64 and batch.context_tokens.shape == (4, 64)
    row = batch.context_tokens[0, : batch.context_lengths[0]]
    e = batch.examples[0]
    assert tokenizer.decode(row.tolist()) == f"<bos>{e.prompt}{e.answer}={e.completion}"
    with pytest.raises(ValueError, match=r"prompt 0 .*\{solution\}"):
        make(tokenizer, context_template="{solution}")


def test_demonstrations(tokenizer):
    prompts = make(tokenizer, max_completion_length=32)
    batch = prompts[1]
    assert prompts.completion_bucket == 32 and batch.completions.shape == (4, 32)
    for row, length, example in zip(batch.completions, batch.completion_lengths, batch.examples, strict=True):
        assert tokenizer.decode(row[:length].tolist()) == example.completion + "."
        assert row[length - 1] == tokenizer.eos_token_id
    short = make(tokenizer, arithmetic.make(size=100), max_completion_length=18)
    assert 0 < short.dropped < 100
    assert all(len(e.completion) + 1 <= 18 for e in short[0].examples)
    with pytest.raises(ValueError, match="example 1 of 'listed' has no completion"):
        make(tokenizer, Listed(Example("1", completion="1"), Example("2")), max_completion_length=8)


def test_limit_and_progress(tokenizer):
    seen = []
    prompts = make(
        tokenizer,
        arithmetic.make(size=5000),
        limit=2500,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(prompts) == 2500
    assert seen == [(1024, 2500), (2048, 2500), (2500, 2500)]


def test_the_bad_example_is_named(tokenizer):
    with pytest.raises(ValueError, match="text 2 cannot be tokenized: 'x'"):
        make(tokenizer, Listed(Example("1"), Example("2"), Example("x")))
    with pytest.raises(ValueError, match="'listed' has no examples"):
        make(tokenizer, Listed())
    with pytest.raises(ValueError, match="too_long"):
        make(tokenizer, too_long="truncate")
    with pytest.raises(ValueError, match="batch_size"):
        make(tokenizer, batch_size=0)


def test_an_empty_prompt_is_an_error():
    tokenizer = arithmetic.make_tokenizer()
    without_bos = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.backend_tokenizer.post_processor = without_bos
    with pytest.raises(ValueError, match="prompt of example 1 is empty"):
        make(tokenizer, Listed(Example("1"), Example("")))
