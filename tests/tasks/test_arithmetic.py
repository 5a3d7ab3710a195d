import itertools
import re

import numpy as np
import pytest
import transformers

from opd_jax.tasks import Task, arithmetic, encode_completion


def judge(problem: str, completion: str) -> str:
    """Checks every step of a completion by other means than the task's; returns the answer."""
    steps, answer = completion.split(">")
    steps = [re.fullmatch(r"(\d)([+*-])(\d)=(\d+)", step).groups() for step in steps.split(",")]
    addition = re.fullmatch(r"(\d{2,3})\+(\d{2,3})=", problem)
    if addition:
        left, right = addition.groups()
        assert [s[0] for s in steps] == list(left[::-1])
        assert [s[2] for s in steps] == list(right[::-1])
        for i, step in enumerate(steps, 1):  # a step's result is the head of the partial sum
            partial = int(left[-i:]) + int(right[-i:])
            assert step[3] == f"{partial:0{i + 1}d}"[:2]
        assert answer == f"{int(left) + int(right):0{len(left) + 1}d}"
    else:
        value = int(problem[0])
        for (a, operator, b, result), (o, d) in zip(steps, re.findall(r"([+*-])(\d)", problem), strict=True):
            assert (a, operator, b) == (str(value), o, d)
            value = eval(f"({value}{o}{d}) % 10")
            assert result == str(value)
        assert answer == str(value)
    return answer


def test_every_two_digit_addition_and_every_short_chain():
    additions = [f"{a}+{b}=" for a, b in itertools.product(range(10, 100), repeat=2)]
    chains = [
        f"{a}{o}{b}{p}{c}{q}0="
        for a, b, c in itertools.product(range(10), repeat=3)
        for o, p, q in itertools.product("+-*", repeat=3)
    ]
    for problem in additions + chains:
        completion, answer = arithmetic.solve(problem)
        assert judge(problem, completion) == answer


def test_three_digit_additions_and_long_chains():
    task = arithmetic.make(size=3000, seed=5)
    lengths = {0}
    for i in range(len(task)):
        example = task[i]
        assert judge(example.prompt, example.completion) == example.answer
        assert task.verify(example.completion, example) == 1
        assert task.verify(example.completion + ".", example) == 1
        assert len(example.prompt) + 1 <= arithmetic.MAX_PROMPT_LENGTH
        lengths.add(len(example.completion) + 1)
    assert max(lengths) == arithmetic.MAX_COMPLETION_LENGTH
    assert isinstance(task, Task)


def test_prototype_examples():
    assert arithmetic.solve("534+163=") == ("4+3=07,3+6=09,5+1=06>0697", "0697")
    assert arithmetic.solve("5*1-5+9-9=") == ("5*1=5,5-5=0,0+9=9,9-9=0>0", "0")


@pytest.mark.parametrize(
    "completion, reward",
    [(">0697", 1), ("1>0697.", 1), (">0697..", 0), (">0697>0697", 0), ("0697", 0), (">697", 0)],
)
def test_verify(completion, reward):
    example = arithmetic.Example("534+163=", "0697")
    assert arithmetic.make().verify(completion, example) == reward


def test_examples_are_pinned_and_depend_on_seed_and_index_alone():
    prompts = [arithmetic.make(size=n, seed=7)[3].prompt for n in (4, 1000)]
    assert prompts == [arithmetic.make(seed=7, demonstrations="mixed")[3].prompt] * 2
    assert [arithmetic.make(seed=0)[i].prompt for i in range(3)] == PINNED
    assert arithmetic.make(seed=1)[0].prompt != PINNED[0]


PINNED = ["848+829=", "7-3*4-7=", "707+371="]


def test_mixed_demonstrations_err_as_described():
    task = arithmetic.make(size=8000, demonstrations="mixed")
    examples = [task[i] for i in range(len(task))]
    jumps = np.array([e.completion.startswith(">") for e in examples])
    right = np.array([task.verify(e.completion, e) for e in examples])
    assert abs(jumps.mean() - arithmetic.JUMP) < 0.02
    # By hand: a jump over one digit is right with 0.64.
    chain = np.array([e.metadata["kind"] == "chain" for e in examples])
    assert abs(chain.mean() - 0.5) < 0.02
    assert abs(right[jumps & chain].mean() - 0.64) < 0.05
    # The prototype's base, trained on such demonstrations, scored 0.47 to 0.49.
    assert 0.46 < right.mean() < 0.52
    # Most steps are right, whatever the mistakes: the skill is there.
    assert max(len(e.completion) for e in examples) < arithmetic.MAX_COMPLETION_LENGTH


def test_splits_share_no_problem():
    parts = [
        {e.prompt for e in (arithmetic.make(size=4000, split=s)[i] for i in range(4000))}
        for s in ("train", "held_out")
    ]
    assert not parts[0] & parts[1]
    everything = [arithmetic.make(size=4000)[i].prompt for i in range(4000)]
    share = np.mean([arithmetic._split_of(p) == "held_out" for p in everything])
    assert abs(share - 1 / 8) < 0.03


@pytest.mark.parametrize(
    "options",
    [{"size": 0}, {"size": 2.5}, {"kinds": ["add"]}, {"kinds": []}, {"demonstrations": "good"},
     {"split": "test"}],
)  # fmt: skip
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        arithmetic.make(**options)


def test_index_out_of_range_ends_iteration():
    assert len(list(arithmetic.make(size=5))) == 5
    with pytest.raises(IndexError, match="5 of 5"):
        arithmetic.make(size=5)[5]


def test_tokenizer(tmp_path):
    tokenizer = arithmetic.make_tokenizer()
    assert len(tokenizer) == 19
    ids = tokenizer("534+1=")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and len(ids) == 7
    assert tokenizer.decode(ids, skip_special_tokens=True) == "534+1="
    assert encode_completion(tokenizer, ">5") == [*tokenizer.convert_tokens_to_ids([">", "5"]), 2]
    assert not tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("534+1=")["input_ids"] == ids
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id) == (0, 1, 2)
    assert again.decode(ids, skip_special_tokens=True) == "534+1="
