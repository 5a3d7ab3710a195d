"""Pairs of models that do not fit are told apart before training, in words."""

import pytest

from opd_jax.training._pair import check_pair, check_width

VOCABULARY = {"a": 0, "b": 1, "</s>": 2, "<|end|>": 3}


class Tokenizer:
    def __init__(self, vocabulary=VOCABULARY, chat_template=None):
        self.vocabulary, self.chat_template = dict(vocabulary), chat_template

    def get_vocab(self):
        return dict(self.vocabulary)

    def convert_ids_to_tokens(self, ids):
        names = {i: token for token, i in self.vocabulary.items()}
        return [names.get(i) for i in ids]


def check(student, teacher, stops=(2,), teacher_stops=(2,), chat=True):
    check_pair(student, teacher, stops=stops, teacher_stops=teacher_stops, chat=chat)


def message(*args, **kwargs) -> str:
    with pytest.raises(ValueError, match="does not fit the student:\n") as error:
        check(*args, **kwargs)
    return str(error.value)


def test_pairs_that_fit():
    check(Tokenizer(), Tokenizer())
    check(Tokenizer(chat_template="x"), Tokenizer(chat_template="x"), stops=(2, 3), teacher_stops=(3, 2))


def test_a_token_of_another_id():
    teacher = Tokenizer(VOCABULARY | {"a": 1, "b": 0})
    text = message(Tokenizer(), teacher)
    assert "differ in 2 entries: 'a' is id 0 to the student (4 entries) and 1 to the teacher (4)" in text
    assert "two models of one tokenizer" in text


def test_a_token_that_one_lacks():
    text = message(Tokenizer(), Tokenizer(VOCABULARY | {"<think>": 4}))
    assert (
        "differ in 1 entries: '<think>' is id None to the student (4 entries) and 4 to the teacher (5)"
        in text
    )
    text = message(Tokenizer(VOCABULARY | {"<think>": 4}), Tokenizer())
    assert "'<think>' is id 4 to the student (5 entries) and None to the teacher (4)" in text


def test_other_ends():
    text = message(Tokenizer(), Tokenizer(), stops=(2,), teacher_stops=(2, 3))
    assert "the student ends with ['</s>'] and the teacher with ['</s>', '<|end|>']" in text
    assert "eos_token_id" in text and "generation_config.json" in text


def test_an_end_that_the_tokenizer_does_not_know():
    text = message(Tokenizer(), Tokenizer(), stops=(2,), teacher_stops=(2, 9))
    assert "the teacher with ['</s>', 'None']" in text


@pytest.mark.parametrize(
    ("mine", "theirs", "words"),
    [
        (None, "{{ x }}", "student: none, teacher: one of 7 characters"),
        ("{{ x }}", None, "student: one of 7 characters, teacher: none"),
        ("{{ x }}", "{{ y }} ", "student: one of 7 characters, teacher: one of 8 characters"),
    ],
)
def test_other_chat_templates(mine, theirs, words):
    student, teacher = Tokenizer(chat_template=mine), Tokenizer(chat_template=theirs)
    text = message(student, teacher)
    assert words in text and "chat_template.jinja" in text and "data.chat: never" in text
    check(student, teacher, chat=False)


def test_everything_wrong_is_told_at_once():
    text = message(
        Tokenizer(chat_template="x"), Tokenizer(VOCABULARY | {"c": 9}), stops=(2,), teacher_stops=(3,)
    )
    assert text.count("\n  - ") == 2 and "'c'" in text and "chat templates differ" in text
    text = message(Tokenizer(chat_template="x"), Tokenizer(), stops=(2,), teacher_stops=(3,))
    assert text.count("\n  - ") == 2 and "ends with" in text


def test_a_model_narrower_than_its_tokenizer():
    check_width("student", 4, Tokenizer())
    check_width("student", 9, Tokenizer())
    with pytest.raises(
        ValueError, match="the student's tokenizer has ids up to 3, but its model has a vocabulary of 3"
    ):
        check_width("student", 3, Tokenizer())
