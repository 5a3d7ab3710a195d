"""Alignment against a brute-force search, and bytes of tokens against what tokenizers decode."""

import json
from functools import cache
from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers, trainers

from opd_jax import models
from opd_jax.tasks import align, retokenize, token_bytes

CORPUS = [
    "The sum of 12 and 345 is 357.\nSo the answer is 357.",
    "naïve café — 你好。世界 12,000 元\n\n",
    "def f(x):\n    return x ** 2  # 🙂👍🏽\n",
    "the quick brown fox jumps over the lazy dog " * 3,
]
TEXTS = [*CORPUS, "", " ", "\n", "  two  spaces ", "x🙂\r\n\tΩ", "<|end|> and </s>", "1234567", "a", "é" * 5]
KINDS = ("bytes300", "bytes420", "llama", "metaspace", "gemma")


@cache
def make(kind):
    """A tokenizer trained on the spot; `<|end|>` or `</s>` is its end."""
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    if kind.startswith("bytes"):
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=int(kind[5:]),
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(CORPUS, trainer)
        backend.add_tokens(["<think>"])  # an added token that is not special has a text
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *fallback],
        limit_alphabet=60,
        show_progress=False,
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    elif kind == "llama":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence(steps)
    if kind != "metaspace":  # learn words; the tokenizer itself merges across them, as SentencePiece does
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator(CORPUS, trainer)
    config = json.loads(backend.to_str())
    # The trainer makes bytes special tokens; in models they are ordinary ones.
    config["added_tokens"] = [t for t in config["added_tokens"] if t["content"] not in fallback]
    if kind != "metaspace":
        config["pre_tokenizer"] = None
    state = tokenizers.Tokenizer.from_str(json.dumps(config))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=state, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def brute_force(mine, theirs):
    """Spans by walking byte by byte; -1 for tokens without bytes."""
    boundaries = [{sum(map(len, p[: i + 1])) for i in range(len(p))} for p in (mine, theirs)]
    common = sorted((boundaries[0] & boundaries[1]) - {0})
    spans = []
    for pieces in (mine, theirs):
        row, end = [], 0
        for piece in pieces:
            end += len(piece)
            row.append(next(i for i, c in enumerate(common) if c >= end) if piece else -1)
        spans.append(row)
    if mine and theirs and mine[-1] == theirs[-1] == b"":
        spans[0][-1] = spans[1][-1] = len(common)
        return *spans, len(common) + 1
    return *spans, len(common)


@st.composite
def two_splits(draw):
    data = draw(st.binary(max_size=24))
    cut = st.lists(st.integers(0, len(data)), max_size=12).map(sorted)  # equal cuts: tokens without bytes
    rows = []
    for _ in range(2):
        places = [0, *draw(cut), len(data)]
        rows.append([data[a:b] for a, b in pairwise(places)])
    return rows


@settings(max_examples=200, deadline=None)
@given(two_splits())
def test_random_splits(rows):
    mine, theirs = rows
    spans = align(mine, theirs)
    student, teacher, count = brute_force(mine, theirs)
    np.testing.assert_array_equal(spans.student, student)
    np.testing.assert_array_equal(spans.teacher, teacher)
    assert spans.count == count and spans.student.dtype == spans.teacher.dtype == np.int32
    for i in range(count):  # a span is the same text to both
        texts = [
            b"".join(p for p, s in zip(pieces, row, strict=True) if s == i)
            for pieces, row in zip(rows, spans[:2], strict=True)
        ]
        assert texts[0] == texts[1]
    # Aligned with itself, every token with bytes is alone.
    own = align(mine, mine).student
    assert len(set(own[own >= 0].tolist())) == (own >= 0).sum()


def test_ends_are_a_span_only_together():
    np.testing.assert_array_equal(align([b"a", b""], [b"a", b""]).student, [0, 1])
    np.testing.assert_array_equal(align([b"a", b""], [b"a"]).student, [0, -1])
    np.testing.assert_array_equal(align([b"", b"a"], [b"a", b""]).teacher, [0, -1])
    np.testing.assert_array_equal(align([b""], [b""]).student, [0])
    assert align([], []).count == 0 and align([b"", b"", b""], [b""]).student.tolist() == [-1, -1, 0]


def test_different_bytes():
    with pytest.raises(ValueError, match=r"from byte 2 on the student has b'c', the teacher b'd'"):
        align([b"ab", b"c"], [b"a", b"bd"])
    with pytest.raises(ValueError, match="different bytes: from byte 1"):
        align([b"a"], [b"a", b"b"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_spell_the_text(kind, text):
    tokenizer = make(kind)
    ids = encode(tokenizer, text)
    spelled = b"".join(token_bytes(tokenizer, ids))
    if kind in ("llama", "metaspace"):  # encoding has put a space in front
        assert spelled in (b" " + text.encode(), text.encode())
    else:
        assert spelled == text.encode()
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).lstrip(" ") == text.lstrip(" ")


def test_bytes_of_single_tokens():
    tokenizer = make("bytes300")
    table = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in map(chr, range(0x20, 0x180)):  # the library's own table of bytes
        ((name, _),) = table.pre_tokenize_str(text)
        ids = [tokenizer.convert_tokens_to_ids(c) for c in name]
        assert token_bytes(tokenizer, ids) == [bytes([b]) for b in text.encode()]
    think, end = tokenizer.convert_tokens_to_ids(["<think>", "<|end|>"])
    assert token_bytes(tokenizer, [think, end, 10**6, -1]) == [b"<think>", b"", b"", b""]
    llama = make("llama")
    ids = llama.convert_tokens_to_ids(["<0xF0>", "<0x0A>", "▁the", "</s>", "<unk>"])
    assert token_bytes(llama, np.asarray(ids)) == [b"\xf0", b"\n", b" the", b"", b""]


def test_unknown_kinds():
    for decoder, message in ((None, "has no decoder"), (decoders.WordPiece(), "WordPiece")):
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        if decoder is not None:
            backend.decoder = decoder
        with pytest.raises(ValueError, match=message):
            token_bytes(transformers.PreTrainedTokenizerFast(tokenizer_object=backend), [])
    with pytest.raises(ValueError, match=r"not of <class 'tuple'>"):
        token_bytes((), [])


def stop(tokenizer):
    return tokenizer.eos_token_id


def check(student, teacher, rows, **options):
    """What must hold of any row; returns the result."""
    out = retokenize(teacher, student, rows, stops=[stop(student)], teacher_stop=stop(teacher), **options)
    assert {a.dtype for a in out} == {np.dtype(np.int32)}
    for i in range(len(rows)):
        student_ids = [int(t) for t in rows[i]][: None if "lengths" not in options else options["lengths"][i]]
        mine = token_bytes(student, student_ids)
        theirs = token_bytes(teacher, out.teacher_ids[i])
        common = set(out.student_spans[i].tolist()) - {-1}
        assert common == set(out.teacher_spans[i].tolist()) - {-1} == set(range(len(common)))
        for span in common:
            text = [
                b"".join(p for p, s in zip(pieces, spans, strict=False) if s == span)
                for pieces, spans in ((mine, out.student_spans[i]), (theirs, out.teacher_spans[i]))
            ]
            assert text[0] == text[1]
    return out


@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("student", KINDS)
def test_every_pair(student, teacher):
    """All text is in spans, whatever the two; the same tokenizer aligns token by token."""
    student, teacher = make(student), make(teacher)
    rows = [[*encode(student, text), stop(student)] for text in TEXTS]
    out = check(student, teacher, rows)
    for row, ids, theirs, spans in zip(rows, *out, strict=True):
        assert (spans[: len(row)] >= 0).all() and (spans[len(row) :] == -1).all()
        length = (theirs >= 0).sum()
        assert (theirs[:length] >= 0).all() and ids[length - 1] == stop(teacher)
        spelled = b"".join(token_bytes(student, row))
        assert b"".join(token_bytes(teacher, ids[: length - 1])) == spelled
        if student is teacher:
            np.testing.assert_array_equal(spans[: len(row)], np.arange(len(row)))
    if student is teacher and student is make("bytes420"):  # nothing is put in front: the very same tokens
        np.testing.assert_array_equal(out.teacher_ids[0][: len(rows[0])], rows[0])


def test_no_space_in_front():
    """A completion continues its prompt: its first token is not the one with a space."""
    student, llama = make("bytes300"), make("llama")
    out = check(student, llama, [encode(student, "the fox")])
    assert token_bytes(llama, out.teacher_ids[0])[0][:1] == b"t"
    assert encode(llama, "the fox")[0] == llama.convert_tokens_to_ids("▁the")


def test_cut_characters():
    student, teacher = make("bytes300"), make("llama")
    whole = encode(student, "ab 🙂🙂")
    assert len(whole) >= 8 and len(token_bytes(student, whole)[-1]) == 1
    out = check(student, teacher, [whole[:-1], [*whole[:-1], stop(student)], [*whole[:-1], whole[0]]])
    seen = out.student_spans >= 0
    np.testing.assert_array_equal(seen[0], seen[1])  # behind a cut character, the end has no counterpart
    np.testing.assert_array_equal(seen[0], seen[2])
    pieces = token_bytes(student, whole)
    ends = np.cumsum([len(p) for p in pieces])
    np.testing.assert_array_equal(seen[0, : len(whole) - 1], ends[:-1] <= len("ab 🙂".encode()))
    assert (check(student, teacher, [[i] for i in whole[-3:]]).student_spans == -1).all()


def test_without_an_end_and_inner_special_tokens():
    student, teacher = make("bytes300"), make("bytes420")
    text = encode(student, "the answer")
    row = [*text[:2], stop(student), *text[2:]]
    out = check(student, teacher, [row, text, [stop(student)], []])
    assert not (out.teacher_ids[:2] == stop(teacher))[out.teacher_spans[:2] >= 0].any()
    assert out.student_spans[0, 2] == -1 and (np.delete(out.student_spans[0], 2) >= 0).all()
    assert out.student_spans[2].max() == 0 and (out.student_spans[3] == -1).all()
    # Any of several stops is the end, one with a text of its own, too.
    newline = encode(student, "\n")
    out = retokenize(teacher, student, [text + newline], stops=[stop(student), *newline], teacher_stop=0)
    assert out.teacher_ids[0, (out.teacher_spans[0] >= 0).sum() - 1] == 0
    assert out.student_spans[0, -1] == out.student_spans.max()


def test_special_names_are_text():
    student, teacher = make("llama"), make("bytes420")
    row = encode(student, "a <|end|> b")
    out = check(student, teacher, [row])
    assert stop(teacher) not in out.teacher_ids[0][out.teacher_spans[0] >= 0]
    assert (out.student_spans >= 0).all()


def test_a_teacher_that_normalises():
    backend = tokenizers.Tokenizer.from_str(make("bytes420").backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    teacher = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    student = make("bytes300")
    prefix, rest = encode(student, "ok "), [*encode(student, "e\u0301 ok"), stop(student)]
    out = check(student, teacher, [prefix + rest, prefix + encode(student, "é")])
    assert (out.student_spans[0, : len(prefix)] >= 0).any() and (
        out.student_spans[0, -len(rest) :] == -1
    ).all()
    assert (out.student_spans[1, : len(prefix) + 2] >= 0).all()


def test_arrays_and_a_fixed_width():
    student, teacher = make("bytes420"), make("bytes300")
    rows = [[*encode(student, text), stop(student)] for text in TEXTS[:5]]
    lengths = np.array([len(row) for row in rows])
    padded = np.zeros((len(rows), lengths.max() + 3), np.int32)  # 0 is a stop: padding must not count
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    lists = check(student, teacher, rows)
    arrays = check(student, teacher, padded, lengths=lengths)
    for a, b in zip(lists[:2], arrays[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    assert arrays.student_spans.shape == padded.shape and lists.teacher_ids.shape[1] in (64, 128, 256)
    np.testing.assert_array_equal(arrays.student_spans[:, : lengths.max()], lists.student_spans)
    for width in (1, 7, 40):
        cut = check(student, teacher, rows, width=width)
        assert cut.teacher_ids.shape == (len(rows), width)
        # What is left is the beginning of the whole alignment.
        kept = cut.student_spans >= 0
        np.testing.assert_array_equal(cut.student_spans[kept], lists.student_spans[kept])
        for i, whole in enumerate(lists.teacher_spans):
            lost = whole[width:][whole[width:] >= 0]
            spans = lists.student_spans[i]
            np.testing.assert_array_equal(kept[i], (spans >= 0) & (spans < lost.min(initial=10**6)))
    with pytest.raises(ValueError, match="give their lengths"):
        retokenize(teacher, student, padded, stops=[0], teacher_stop=0)


def test_demo_tokenizer():
    demo = models.load_tokenizer(files("opd_jax") / "demo" / "base")
    student = make("bytes420")
    row = [*encode(student, "12+345=357"), stop(student)]
    out = check(student, demo, [row])
    assert (out.student_spans >= 0).all() and out.teacher_ids[0, 10] == stop(demo)
    assert demo.decode(out.teacher_ids[0, :10]) == "12+345=357"
    back = check(demo, student, [out.teacher_ids[0, :11].tolist()])
    assert (back.student_spans >= 0).all()
    with pytest.raises(ValueError, match="cannot encode the completion 'fox'"):
        check(student, demo, [encode(student, "12"), encode(student, "fox")])
