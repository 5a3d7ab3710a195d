import os
import sys
import threading
import time

import pytest

from opd_jax.tasks import Example, _math, final_answer, get_verifier


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("  5 ", "5"),
        ("<answer>4</answer> no, <answer> 5 </answer>", "5"),
        (r"\boxed{4}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} it is", r"\{1, 2\}"),
        (r"the \boxed{5} or \boxed{", "5"),
        ("12 - 7 = 5\n#### 5\n", "5"),
        ("First answer: 4.\nFinal answer: **5**.\nBye", "5"),
        ("I think the answer is 5.", "5"),
        ("Answer:\n5", "5"),
        (r"<think>\boxed{4}</think>The answer is 5", "5"),
        ("<think>5", "<think>5"),
        (r"Answer: 4 and \boxed{5}", "5"),
        ("", ""),
        ("####", ""),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    "name, completion, answer, reward",
    [
        ("exact", "The answer is  New   York.", "New York", 1),
        ("exact", "#### 72", "6 * 12 = 72\n#### 72", 1),
        ("exact", "new york", "New York", 0),
        ("exact", "15", "5", 0),
        ("contains", "so it is 5.", "5", 1),
        ("contains", "(5)", "5", 1),
        ("contains", "15", "5", 0),
        ("contains", "5.5", "5", 0),
        ("contains", "1,500", "500", 0),
        ("contains", "-5", "5", 0),
        ("contains", "it is [a-z]+", "[a-z]+", 1),
        ("math", r"so \boxed{\frac{1}{2}}", "0.5", 1),
        ("math", "so 1/2", r"\frac12", 1),
        ("math", r"\boxed{(2,1)}", "(1,2)", 0),
        ("math", r"\boxed{1+x^2}", "x^2+1", 1),
        ("math", r"\boxed{34} or rather \boxed{35}", "34", 0),
        ("math", r"<think>\boxed{34}</think>\boxed{35}", "34", 0),
        ("math", "no number", "34", 0),
        ("math", "", "34", 0),
        ("math", r"\boxed{1000}", "1,000", 1),
        ("math", r"$12\text{ cm}$", "12", 1),
    ],
)
def test_rewards(name, completion, answer, reward):
    assert get_verifier(name)(completion, Example("", answer=answer)) == reward


@pytest.mark.parametrize("name", ["exact", "contains", "math"])
def test_no_answer_is_an_error(name):
    with pytest.raises(ValueError, match="no answer"):
        get_verifier(name)("5", Example("a prompt"))


def test_math_survives_an_endless_answer(monkeypatch):
    math = get_verifier("math")
    assert math(r"\boxed{9^{9^{9^{9}}}}", Example("", answer="34")) == 0
    assert math(r"\boxed{34}", Example("", answer="34")) == 1


def test_math_kills_a_process_that_hangs(monkeypatch):
    assert _math.equal("34", "34")
    hung = _math._worker
    monkeypatch.setattr(_math, "_ANSWER_S", 0.5)
    os.kill(hung._process.pid, 19)  # SIGSTOP
    started = time.monotonic()
    assert not _math.equal("34", "34")
    assert time.monotonic() - started < 10
    assert hung._process.poll() is not None
    monkeypatch.undo()
    assert _math.equal("34", "34")  # a fresh process


def test_math_works_in_any_thread_and_evaluates_nothing(tmp_path):
    trap = tmp_path / "trap"
    rewards = []

    def work():
        for text in ("34", f"__import__('os').system('touch {trap}')", f"$(open('{trap}','w'))$"):
            rewards.append(get_verifier("math")(text, Example("", answer="34")))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert rewards == [1, 0, 0] and not trap.exists()


def test_entry_point(tmp_path, monkeypatch):
    (tmp_path / "my_verifier_module.py").write_text(
        "def length(completion, example):\n    return float(len(completion) == 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert get_verifier("my_verifier_module:length")("abc", Example("")) == 1
    with pytest.raises(ValueError, match=r"has no 'lenght' .did you mean 'length'"):
        get_verifier("my_verifier_module:lenght")


def test_unknown():
    with pytest.raises(ValueError, match=r"unknown verifier 'mathh' .did you mean 'math'"):
        get_verifier("mathh")
    with pytest.raises(ValueError, match="ModuleNotFoundError: No module named 'nowhere'"):
        get_verifier("nowhere:f")
