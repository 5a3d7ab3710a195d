"""One text in two tokenizers: which tokens of one spell the same bytes as which of the other."""

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from opd_jax.rollout import bucket

# Stands in front for tokenizers that put a space before what comes first: a completion does not.
_ANCHORS = ("\n", "0", "a")


class Alignment(NamedTuple):
    """The finest spans of text that both tokenizers delimit.

    Attributes:
        student: [N] int32, the span of each student token, -1 = none.
        teacher: [M] int32, of each teacher token.
        count: spans; they are numbered from 0, in the order of the text.
    """

    student: np.ndarray
    teacher: np.ndarray
    count: int


class Retokenized(NamedTuple):
    """Completions in the teacher's tokens, and what they have in common with the student's.

    Attributes:
        teacher_ids: [B, M] int32, right padded.
        teacher_spans: [B, M] int32, each token's span, -1 = none or padding.
        student_spans: [B, N] int32, of the student's tokens.
    """

    teacher_ids: np.ndarray
    teacher_spans: np.ndarray
    student_spans: np.ndarray


def align(student_pieces: Sequence[bytes], teacher_pieces: Sequence[bytes]) -> Alignment:
    """Aligns two tokenisations of the same bytes.

    A span reaches from one boundary that both have to the next; where the two agree, it holds one token of
    each. Tokens without bytes (special tokens) are in no span, except that if both end with one, these two
    are a last span of their own: the ends of both.

    Args:
        student_pieces: the bytes of each of N tokens, from `token_bytes`.
        teacher_pieces: of each of M tokens.

    Returns:
        The spans.

    Raises:
        ValueError: if the pieces do not concatenate to the same bytes, naming where they differ.

    Example:
        >>> spans = align([b"12", b"+", b"3", b""], [b"1", b"2+", b"3", b""])
        >>> print(spans.student, spans.teacher)
        [0 0 1 2] [0 0 1 2]

    References:
        Boizard et al., *ULD*, `arXiv:2402.12030 <https://arxiv.org/abs/2402.12030>`_
    """
    mine, theirs = b"".join(student_pieces), b"".join(teacher_pieces)
    if mine != theirs:
        at = _agreement(mine, theirs)
        raise ValueError(
            f"the two tokenisations are of different bytes: from byte {at} on the student has "
            f"{mine[at : at + 16]!r}, the teacher {theirs[at : at + 16]!r}"
        )
    return _align(student_pieces, teacher_pieces, len(mine), _ends_empty(student_pieces, teacher_pieces))


def token_bytes(tokenizer: Any, ids: Iterable[int]) -> list[bytes]:
    """The bytes that each token stands for within a text.

    They are exact, also where a character is spread over several tokens. Special tokens, the unknown token
    and ids without a token stand for no bytes.

    Args:
        tokenizer: a `transformers` tokenizer backed by `tokenizers`, whose decoder is that of a byte-level
            BPE, of a SentencePiece model (metaspace, with or without byte fallback), or simply joins tokens.
        ids: tokens; none to find out only whether the tokenizer is of a known kind.

    Returns:
        The bytes of each token.

    Raises:
        ValueError: if the tokenizer is of another kind (such as WordPiece, whose tokens do not say where
            the spaces were).

    Example:
        >>> from importlib.resources import files
        >>> from opd_jax import models
        >>> tokenizer = models.load_tokenizer(files("opd_jax") / "demo" / "base")
        >>> token_bytes(tokenizer, [1, 3, 13, 4, 2])
        [b'', b'0', b'+', b'1', b'']
    """
    spelling = _spelling(tokenizer, len(tokenizer))
    return [spelling[int(i)] for i in ids]


def retokenize(
    teacher_tokenizer: Any,
    student_tokenizer: Any,
    completion_ids: Sequence[Sequence[int]] | np.ndarray,
    *,
    stops: Iterable[int],
    teacher_stop: int,
    lengths: Sequence[int] | np.ndarray | None = None,
    width: int | None = None,
) -> Retokenized:
    """The student's completions in the teacher's tokens, with the spans of text that both delimit.

    The text of a completion is encoded as a continuation: without special tokens and without the space that
    some tokenizers put in front; text that looks like a special token is encoded as text. A completion that
    ended with one of `stops` ends with `teacher_stop`, in a span of the two.

    Student tokens are in no span, -1, where no teacher token can answer them: from the first bytes on that
    are not UTF-8 (a character cut off at the end), or that the teacher's tokenizer changes (Unicode
    normalisation, unknown characters) or that do not fit into `width`, and the end after such a place;
    special tokens within the text. The share of tokens in spans is worth a look, and `token_bytes` of no ids
    before a run.

    Args:
        teacher_tokenizer: a `transformers` tokenizer, see `token_bytes`.
        student_tokenizer: likewise.
        completion_ids: B rows of the student's tokens, or an array [B, N], right padded.
        stops: the student's tokens that end a completion.
        teacher_stop: the teacher's.
        lengths: [B], tokens of each row without padding; needed for an array.
        width: M; None: the power of two that holds the longest.

    Returns:
        The teacher's tokens and the spans; N is the array's, or the length of the longest row.

    Raises:
        ValueError: if a tokenizer is of an unknown kind, the teacher's fails on a text, or an array comes
            without lengths.
    """
    if lengths is None and isinstance(completion_ids, np.ndarray):
        raise ValueError("completions in an array [B, N] are padded: give their lengths [B], too")
    if lengths is None:
        lengths = [len(row) for row in completion_ids]
    size = max((len(row) for row in completion_ids), default=0)
    rows = [np.asarray(r)[:n].tolist() for r, n in zip(completion_ids, lengths, strict=True)]
    stops = frozenset(map(int, stops))
    ended = [bool(row) and row[-1] in stops for row in rows]
    pieces = [
        token_bytes(student_tokenizer, row[: len(row) - end]) for row, end in zip(rows, ended, strict=True)
    ]
    texts = [_text(b"".join(row)) for row in pieces]
    encoded = _encode_continuations(teacher_tokenizer, texts)
    if width is None:
        width = bucket(max((len(ids) + 1 for ids, _ in encoded), default=1))
    padding = getattr(teacher_tokenizer, "pad_token_id", None) or 0
    out = Retokenized(
        np.full((len(rows), width), padding, np.int32),
        np.full((len(rows), width), -1, np.int32),
        np.full((len(rows), size), -1, np.int32),
    )
    for i, (mine, end, (ids, theirs)) in enumerate(zip(pieces, ended, encoded, strict=True)):
        spelled = b"".join(mine)
        agreed = _agreement(spelled, b"".join(theirs))
        end = end and agreed == len(spelled) == sum(map(len, theirs))
        ids, theirs = [*ids, *[teacher_stop] * end], [*theirs, *[b""] * end]
        student, teacher, _ = _align([*mine, *[b""] * end], theirs, agreed, end)
        if len(ids) > width:  # a span goes with the teacher's tokens that do not fit
            student[student >= teacher[width:][teacher[width:] >= 0].min(initial=len(ids))] = -1
            teacher = np.where(np.isin(teacher, student), teacher, -1)
        keep = min(len(ids), width)
        out.teacher_ids[i, :keep], out.teacher_spans[i, :keep] = ids[:keep], teacher[:keep]
        out.student_spans[i, : len(student)] = student
    return out


def _align(mine: Sequence[bytes], theirs: Sequence[bytes], agreed: int, both_end: bool) -> Alignment:
    """`align` of texts whose first `agreed` bytes are the same."""
    sizes = [np.fromiter(map(len, pieces), np.int64, len(pieces)) for pieces in (mine, theirs)]
    ends = [size.cumsum() for size in sizes]
    common = np.intersect1d(*ends)
    common = common[(common > 0) & (common <= agreed)]
    spans = []
    for size, end in zip(sizes, ends, strict=True):
        span = np.searchsorted(common, end)  # the first common boundary at or behind the token's end
        spans.append(np.where((size > 0) & (span < len(common)), span, -1).astype(np.int32))
        if both_end:
            spans[-1][-1] = len(common)
    return Alignment(*spans, len(common) + both_end)


def _ends_empty(mine: Sequence[bytes], theirs: Sequence[bytes]) -> bool:
    return bool(mine and theirs) and mine[-1] == theirs[-1] == b""


def _agreement(mine: bytes, theirs: bytes) -> int:
    """How many bytes at the beginning are the same."""
    if mine == theirs:
        return len(mine)
    differing = (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
    return next(differing, min(len(mine), len(theirs)))


def _text(data: bytes) -> str:
    """The longest text that the bytes begin with."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def _encode_continuations(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], list[bytes]]]:
    """Tokens, and their bytes, of texts that something stands before."""
    anchors = _ANCHORS if _puts_space(tokenizer, len(tokenizer)) else ("",)
    found = _behind(tokenizer, texts, anchors[0])
    for anchor in anchors[1:]:
        missing = [i for i, row in enumerate(found) if row is None]
        again = _behind(tokenizer, [texts[i] for i in missing], anchor)
        for i, row in zip(missing, again, strict=True):
            found[i] = row
    return [([], []) if row is None else row for row in found]


def _behind(tokenizer: Any, texts: list[str], anchor: str) -> list[tuple[list[int], list[bytes]] | None]:
    """The tokens behind the anchor, or None for a text whose beginning shares a token with it."""
    found = []
    for ids in _encode(tokenizer, [anchor + text for text in texts]) if texts else []:
        pieces = token_bytes(tokenizer, ids)
        seen, start = b"", 0
        while anchor and seen.lstrip(b" ") != anchor.encode() and start < len(ids):
            seen, start = seen + pieces[start], start + 1
        shared = anchor and seen.lstrip(b" ") != anchor.encode()
        found.append(None if shared else (ids[start:], pieces[start:]))
    return found


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # Nobody means a special token by writing its name: `split_special_tokens` encodes it as text.
    options = dict(add_special_tokens=False, split_special_tokens=True, verbose=False)
    try:
        return tokenizer(texts, **options)["input_ids"]
    except Exception as error:
        if len(texts) == 1:
            raise ValueError(
                f"the teacher's tokenizer cannot encode the completion {texts[0]!r}: {error}"
            ) from error
    return [_encode(tokenizer, [text])[0] for text in texts]


@lru_cache(maxsize=8)
def _puts_space(tokenizer: Any, _size: int) -> bool:
    """Whether a space is put before a text."""
    for text in ("0", "a"):
        try:
            (ids,) = _encode(tokenizer, [text])
        except ValueError:
            continue
        if b"".join(token_bytes(tokenizer, ids)) == b" " + text.encode():
            return True
    return False


class _Spelling(dict):
    """The bytes of each token, found when first asked for."""

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"the bytes of tokens are known of tokenizers with a tokenizer.json, not of {type(tokenizer)}"
            )
        self._name = backend.id_to_token
        added = backend.get_added_tokens_decoder()
        nothing = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        self.update({i: token.content.encode() for i, token in added.items()})
        self.update(dict.fromkeys(nothing, b""))
        self._replacements, self._byte_level, self._byte_fallback = _decoder(backend)

    def __missing__(self, index: int) -> bytes:
        name = self._name(index) if index >= 0 else None
        self[index] = b"" if name is None else self._bytes(name)
        return self[index]

    def _bytes(self, name: str) -> bytes:
        if self._byte_fallback and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes.fromhex(name[3:5])
        for old, new in self._replacements:
            name = name.replace(old, new)
        if self._byte_level and all(c in _BYTES for c in name):
            return bytes(_BYTES[c] for c in name)
        return name.encode()


@lru_cache(maxsize=8)
def _spelling(tokenizer: Any, _size: int) -> _Spelling:
    """Kept until tokens are added."""
    return _Spelling(tokenizer)


def _decoder(backend: Any) -> tuple[list[tuple[str, str]], bool, bool]:
    """What the decoder does to a token: (texts replaced, whether it is byte-level, byte fallback)."""
    if backend.decoder is None:
        raise ValueError(
            "the tokenizer has no decoder and joins tokens with spaces, so that none has bytes of its own; "
            "give tokenizer.json the decoder that belongs to its model (ByteLevel, Metaspace or Fuse)"
        )
    outer = json.loads(backend.to_str())["decoder"]
    replacements, flags, fused = [], set(), False
    for step in outer["decoders"] if outer["type"] == "Sequence" else [outer]:
        kind, pattern = step["type"], step.get("pattern", {})
        if kind == "Replace" and "String" in pattern and not fused:
            replacements.append((pattern["String"], step["content"]))
        elif kind == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif kind == "Fuse":
            fused = True
        elif kind in ("ByteLevel", "ByteFallback"):
            flags.add(kind)
        # What is cut from the whole text's beginning is the space that encoding has put there.
        elif not (kind == "Strip" and fused and step["content"] == " " and step["stop"] == 0):
            raise ValueError(
                f"the tokenizer's decoder has a step {json.dumps(step)}, after which a token's bytes are not "
                "known; known are ByteLevel, Metaspace, ByteFallback, Fuse, and Replace of a fixed text"
            )
    return replacements, "ByteLevel" in flags, "ByteFallback" in flags


def _byte_table() -> dict[str, int]:
    """GPT-2's: printable characters for all bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable}
    return table | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_table()
