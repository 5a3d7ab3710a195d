"""The tokenizer of a model folder, and the tokens it stops at."""

from pathlib import Path
from typing import Any

from opd_jax._extras import require
from opd_jax.models._files import read_json
from opd_jax.models._gguf import GGUFReader
from opd_jax.models._gguf_tokenizer import tokenizer_from_gguf
from opd_jax.models._load import load_config, resolve

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: str | Path) -> Any:
    """Loads the `transformers` tokenizer of a model folder, hub id or GGUF file.

    Code that comes with a model is never run.

    Raises:
        ValueError: if there is no usable tokenizer at `path`.
    """
    path = resolve(path, weights=False)
    if path.is_file():
        return tokenizer_from_gguf(GGUFReader(path))
    # Without any of these, transformers makes a tokenizer that knows no tokens, and says nothing.
    if not any((path / name).exists() for name in VOCABULARIES):
        raise ValueError(f"{path} has no tokenizer: none of {', '.join(VOCABULARIES)}")
    auto = require("transformers").AutoTokenizer
    try:
        return auto.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"no tokenizer could be loaded from {path}: {error}") from error


def stop_token_ids(path: str | Path, tokenizer: Any = None) -> tuple[int, ...]:
    """The tokens at which generation ends, sorted.

    These are the `eos_token_id`s of generation_config.json if it names any, else of config.json,
    together with the tokenizer's own.
    """
    path = resolve(path, weights=False)
    found: set[int] = set()
    if path.is_dir() and (path / "generation_config.json").exists():
        eos = read_json(path, "generation_config.json").get("eos_token_id")
        found = set() if eos is None else set(eos) if isinstance(eos, list) else {eos}
    found = found or set(load_config(path).eos_token_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(int(token) for token in found))
