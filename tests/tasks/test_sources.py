import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd_jax.tasks import Example, Task, arithmetic, load


def jsonl(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


def parquet(tmp_path, rows):
    path = str(tmp_path / "data.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
VERL = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "What is 17 * 2?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4"},
}


def test_arithmetic():
    task = load("arithmetic", options={"size": 5, "seed": 2, "kinds": ["chain"]})
    assert task[4] == arithmetic.make(size=5, seed=2, kinds=["chain"])[4]
    with pytest.raises(ValueError, match=r"no option 'sized' .did you mean 'size'"):
        load("arithmetic", options={"sized": 5})
    with pytest.raises(ValueError, match="split"):
        load("arithmetic", options={"split": "test"})


@pytest.mark.parametrize(
    "row, example",
    [
        ({"prompt": "p", "answer": "a", "x": 1}, Example("p", "a", None, {"x": 1})),
        ({"question": "p", "answer": 7}, Example("p", "7")),
        ({"problem": "p", "solution": "a"}, Example("p", "a")),
        ({"prompt": CHAT, "completion": "c"}, Example(tuple(CHAT), None, "c")),
        ({"prompt": CHAT, "response": None}, Example(tuple(CHAT))),
        (
            {"messages": [*CHAT, {"role": "assistant", "content": "c"}]},
            Example(tuple(CHAT), completion="c"),
        ),
        (VERL, Example(tuple(VERL["prompt"]), "34", None, {
            k: VERL[k] for k in ("data_source", "ability", "extra_info")
        })),
    ],
)  # fmt: skip
def test_layouts(tmp_path, row, example):
    for path in (jsonl(tmp_path, row), parquet(tmp_path, [row])):
        task = load(path)
        assert isinstance(task, Task)
        assert len(task) == 1 and task[0] == example
        with pytest.raises(IndexError):
            task[1]


def test_default_verifiers(tmp_path):
    verl = load(parquet(tmp_path, [VERL]))
    assert verl.verify(r"\boxed{\frac{68}{2}}", verl[0]) == 1
    plain = load(jsonl(tmp_path, {"prompt": "p", "answer": "34"}))
    assert plain.verify("#### 34", plain[0]) == 1
    assert plain.verify("it is 34", plain[0]) == 0
    other = load(jsonl(tmp_path, {"prompt": "p", "answer": "34"}), verifier="contains")
    assert other.verify("it is 34", other[0]) == 1 and other.name == "data.jsonl"
    assert len(other) == 1 and other[0] == plain[0]


def test_options(tmp_path):
    rows = [{"prompt": "no", "q": str(i), "a": i, "c": "x"} for i in range(10)]
    path = jsonl(tmp_path, *rows)
    options = {
        "prompt": "q",
        "answer": "a",
        "completion": "c",
        "start": 2,
        "stop": 5,
        "system": "s",
        "template": r"{prompt}? Use \boxed{}.",
    }
    task = load(path, options=options)
    assert len(task) == 3 and list(task)[2] == Example(
        (
            {"role": "system", "content": "s"},
            {"role": "user", "content": r"4? Use \boxed{}."},
        ),
        "4",
        "x",
        {"prompt": "no"},
    )
    assert len(load(path, options={"start": -2})) == 2
    for bad, message in [
        ({"prompt": "qq"}, "no column 'qq'"),
        ({"prompts": "q"}, "no option 'prompts' .did you mean 'prompt'"),
        ({"start": 10}, "10 rows; start 10"),
        ({"stop": "5"}, "stop must be an integer"),
        ({"template": "{nothing}"}, r"row 1: .*\{nothing\}"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(path, options=bad)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "has no rows"),
        (["", "  "], "has no rows"),
        ([{"prompt": "p"}, "", "{bad"], r"data.jsonl:3: not JSON"),
        ([{"prompt": "p"}, "[1]"], r"data.jsonl:2: expected an object .* found list"),
        (["[" * 100_000], r"data.jsonl:1: not JSON"),
        ([{"text": "p", "label": "a"}], "no prompt column: .*found text, label"),
        ([{"prompt": 5}], "row 1: the prompt must be text or a list"),
        ([{"prompt": []}], "row 1: the prompt must be"),
        ([{"prompt": ["a"]}], "row 1: a message must have a role"),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], "row 1: a message"),
    ],
)
def test_bad_jsonl(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load(jsonl(tmp_path, *rows))


def test_a_bad_row_is_named_when_it_is_used(tmp_path):
    task = load(jsonl(tmp_path, {"prompt": "p"}, {"answer": "a"}))
    with pytest.raises(ValueError, match="row 2: the prompt must be text"):
        task[1]


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"not found: missing.jsonl \(working directory"):
        load("missing.jsonl")
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        load(str(path))
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), str(path))
    with pytest.raises(ValueError, match="has no rows"):
        load(str(path))
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        load(str(path))
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p"}\r\n')
    assert load(str(path))[0].prompt == "p"


def test_unknown_source():
    for source, message in [
        ("arithmetics", "unknown source 'arithmetics' .did you mean 'arithmetic'"),
        ("data.csv", "unknown source 'data.csv'; it must be 'arithmetic'.*'package.module:func"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(source)


def test_entry_point(tmp_path, monkeypatch):
    (tmp_path / "my_task_module.py").write_text(
        "from opd_jax.tasks import arithmetic\n"
        "def make(size=2): return arithmetic.make(size=size)\n"
        "def wrong(): return [1]\n"
        "value = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert len(load("my_task_module:make", options={"size": 7})) == 7
    for source, options, message in [
        ("my_task_module:make", {"sise": 7}, "no option 'sise' .did you mean 'size'"),
        ("my_task_module:makes", {}, "did you mean 'make'"),
        ("my_task_module:wrong", {}, "returned list, which is not a Task: it lacks verify"),
        ("my_task_module:value", {}, "is int, not a function"),
        ("my_other_module:make", {}, "No module named 'my_other_module'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(source, options=options)


def test_reasoning_gym():
    task = load("reasoning-gym:chain_sum", options={"size": 20, "seed": 1, "min_terms": 2})
    example = task[3]
    assert isinstance(task, Task) and len(task) == 20
    assert [m["role"] for m in example.prompt] == ["system", "user"]
    assert "<answer>answer here</answer>" in example.prompt[0]["content"]
    assert task.verify(f"hm <answer>{example.answer}</answer>", example) == 1
    assert task.verify(f"it is {example.answer}", example) < 1
    assert task.verify("<answer>nothing</answer>", example) < 0.5
    assert load("reasoning-gym:chain_sum", options={"seed": 1, "min_terms": 2})[3] == example
    with pytest.raises(IndexError):
        task[20]


def test_reasoning_gym_seeds_share_no_items():
    # In reasoning_gym itself item 1 of seed 0 is item 0 of seed 1.
    def prompts(seed):
        task = load(
            "reasoning-gym:chain_sum",
            options={"size": 50, "seed": seed, "min_digits": 4, "system_prompt": None},
        )
        return {example.prompt for example in task}

    assert len(prompts(0)) == 50 and not prompts(0) & prompts(1)


def test_reasoning_gym_without_instruction_takes_the_whole_completion():
    task = load("reasoning-gym:chain_sum", options={"system_prompt": None})
    assert isinstance(task[0].prompt, str)
    assert task.verify(f" {task[0].answer}\n", task[0]) == 1
    assert load("reasoning-gym:chain_sum", options={"system_prompt": "Be brief."})[0].prompt[0] == {
        "role": "system",
        "content": "Be brief.",
    }


def test_reasoning_gym_scores_are_rewards(monkeypatch):
    task = load("reasoning-gym:chain_sum")
    monkeypatch.setattr(task._dataset, "score_answer", lambda answer, entry: 3)
    assert task.verify("", task[0]) == 1
    monkeypatch.setattr(task._dataset, "score_answer", lambda answer, entry: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert task.verify("", task[0]) == 0


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("chain_sums", {}, "no data set 'chain_sums' .did you mean 'chain_sum'"),
        ("chain_sum", {"min_term": 1}, "no option 'min_term' .did you mean 'min_terms'"),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}, "bad options"),
        ("chain_sum", {"size": 0}, "size must be"),
        ("chain_sum", {"seed": "a"}, "seed must be"),
        ("chain_sum", {"system_prompt": "defualt"}, "did you mean 'default'"),
    ],
)
def test_reasoning_gym_errors(name, options, message):
    with pytest.raises(ValueError, match=message):
        load(f"reasoning-gym:{name}", options=options)
