import pytest
import tokenizers

from opd_jax.tasks import Example, arithmetic, encode_completion, fill, render

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}*{{ m.content }}*"
    "{% elif m.role == 'user' %}+{{ m.content }}{% else %}-{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture
def plain():
    return arithmetic.make_tokenizer()


@pytest.fixture
def chat():
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


MESSAGES = Example(
    (
        {"role": "system", "content": "1"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4"},
    ),
    answer="9",
)


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def test_plain_text_gets_bos_once(plain):
    assert text(plain, render(plain, Example("1+2="))) == "<bos>1+2="


def test_chat_template_once_with_generation_prompt(chat):
    # One BOS: the template's. `tokenizer(text)` would put a second one in front.
    assert text(chat, render(chat, Example("1+2"))) == "<bos>+1+2>"
    assert text(chat, render(chat, MESSAGES)) == "<bos>*1*+2-3.+4>"


def test_never_leaves_the_chat_template_out(chat):
    assert text(chat, render(chat, Example("1+2"), chat="never")) == "<bos>1+2"


def test_matches_apply_chat_template(chat):
    ids = chat.apply_chat_template(list(MESSAGES.prompt), add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert render(chat, MESSAGES) == ids


def test_messages_as_plain_text():
    assert MESSAGES.text == "1\n\n2\n\n3\n\n4"


def test_eos_that_a_tokenizer_appends_is_dropped(plain):
    plain.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A .", special_tokens=[("<bos>", 1), (".", 2)]
    )
    assert text(plain, render(plain, Example("1="))) == "<bos>1="
    assert encode_completion(plain, "1") == [4, 2]


def test_template_replaces_the_last_user_message(chat):
    ids = render(chat, MESSAGES, template="{prompt}={answer}")
    assert text(chat, ids) == "<bos>*1*+2-3.+4=9>"
    assert text(chat, render(chat, Example("1", answer="2"), template="{answer}")) == "<bos>+2>"


def test_fill():
    example = Example("p{x}", answer="a", metadata={"level": 3, "prompt": "shadowed"})
    assert fill(r"{prompt} {answer} {level} \boxed{} \boxed{{{answer}}} {{answer}}", example) == (
        r"p{x} a 3 \boxed{} \boxed{a} {answer}"
    )
    with pytest.raises(ValueError, match=r"\{anwser\}.*it has answer, level, prompt"):
        fill("{anwser}", example)
    with pytest.raises(ValueError, match=r"\{answer\}.*it has prompt"):
        fill("{answer}", Example("p"))
    assert fill("{prompt.__class__}", example) == "{prompt.__class__}"  # no attribute access


def test_errors(plain, chat):
    with pytest.raises(ValueError, match="chat must be"):
        render(plain, Example("1"), chat="always")
    with pytest.raises(ValueError, match="cannot be tokenized: 'hello'"):
        render(plain, Example("hello"))
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="prompt 0 cannot be rendered: roles must alternate"):
        render(chat, Example("1"))
    plain.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        encode_completion(plain, "1")
