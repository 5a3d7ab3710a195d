"""The tokenizer inside a GGUF file, rebuilt without torch.

`transformers` reads it only where torch is installed, and does not know every way of splitting text
before the merges: SmolLM2's digits, which stand alone, for one.
"""

from typing import Any

from opd_jax._extras import require
from opd_jax.models._gguf import GGUFReader

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTROL, _USER_DEFINED = 3, 4
# tokenizer.ggml.pre -> how text is split: a pattern, "gpt2" for the pattern built into
# tokenizers, or "digits" for single digits first and then that.
_SPLITS = {
    "default": "gpt2",
    "gpt-2": "gpt2",
    "smollm": "digits",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def tokenizer_from_gguf(reader: GGUFReader) -> Any:
    """Builds the `transformers` tokenizer that a GGUF file describes.

    Raises:
        ValueError: if it is not a byte-level BPE with a known way of splitting text.
    """
    tokenizers, transformers = require("tokenizers"), require("transformers")

    def get(key: str, default: Any = None) -> Any:
        return reader.get(f"tokenizer.ggml.{key}", default)

    kind, split, tokens = get("model"), get("pre", "default"), get("tokens")
    if kind != "gpt2" or split not in _SPLITS or not tokens:
        raise ValueError(
            f"{reader.path}: cannot rebuild tokenizer {kind!r} with pre-tokenizer {split!r}; only"
            f" 'gpt2' with {', '.join(_SPLITS)}. Load the tokenizer from the model's folder instead"
        )
    llama3 = split in _LLAMA3_NAMES
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in get("merges", [])],
            ignore_merges=llama3,
        )
    )
    if split == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(tokenizers.pre_tokenizers, _SPLITS[split], tokenizers)
    backend.decoder = tokenizers.decoders.ByteLevel()
    added = [
        tokenizers.AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, get("token_type", []), strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)

    bos = get("bos_token_id")
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    if bos is not None and get("add_bos_token", llama3):
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    names = dict(bos_token="bos", eos_token="eos", unk_token="unknown", pad_token="padding")
    ids = {ours: get(f"{theirs}_token_id") for ours, theirs in names.items()}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: tokens[number] for name, number in ids.items() if number is not None},
        chat_template=reader.get("tokenizer.chat_template"),
        model_max_length=reader.config.max_length,
        clean_up_tokenization_spaces=False,
    )


def _pre_tokenizer(pre_tokenizers: Any, split: str, tokenizers: Any) -> Any:
    if split == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "digits":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
