"""A teacher on disk: what it would say at every token of a fixed data set, most likely tokens first.

Log-probs are float32. In 16 bits an entry would take 6 bytes instead of 8 with its id, but at log q = -4 a
bfloat16 is off by up to 0.8% and a float16 by 0.1%, so that the K + 1 categories no longer sum to 1: their
divergence could be negative, and would not be 0 where student and teacher agree.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from opd_jax.losses import coarsen, top_k_support
from opd_jax.models._files import read_json
from opd_jax.models._protocol import LanguageModel, unembed
from opd_jax.tasks import PromptBatch
from opd_jax.training._cache_shards import INDEX, Shard, ShardWriter
from opd_jax.training._checkpoint import checksums
from opd_jax.training._step import _chunks, completion_states


class Cached(NamedTuple):
    """What the teacher said about B completions, N tokens each; padding holds equal probabilities.

    Attributes:
        support: [B, N, K] int32, its most likely tokens at each position, all different.
        log_probs: [B, N, K] float32, of these.
        tail: [B, N] float32, of all other tokens together.
    """

    support: np.ndarray
    log_probs: np.ndarray
    tail: np.ndarray

    @property
    def categories(self) -> np.ndarray:
        """[B, N, K + 1] float32, normalised: the support one by one, and all others; what
        `losses.coarsen(student_log_probs, Support(support, valid))` is compared with."""
        return np.concatenate([self.log_probs, self.tail[..., None]], axis=-1)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Tells apart tokenizers that give their tokens different ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:32]


def make_cache_score(
    graphdef: nnx.GraphDef,
    *,
    top_k: int,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    loss_chunk: int = 512,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The compiled teacher pass: (params, prompts, prompt_lengths, completions) -> support [B, N, K] int32
    and log-probs of its tokens and of all others together [B, N, K + 1] float32.

    Args:
        graphdef: the teacher's.
        top_k: K.
        vocab_size: logits beyond are left out; None: none.
        temperature: divides the logits.
        loss_chunk: tokens whose logits exist on a device at a time.
    """

    @jax.jit
    def score(params, prompts, lengths, completions):
        model = nnx.merge(graphdef, params)
        hidden = completion_states(model, prompts, lengths, completions)

        def chunk(hidden):
            log_probs = jax.nn.log_softmax(unembed(model, hidden)[..., :vocab_size] / temperature)
            support = top_k_support(log_probs, log_probs, top_k, "teacher")
            # The tail is summed, not 1 - mass: a teacher that is sure would have none.
            return support.ids.astype(jnp.int32), coarsen(log_probs, support)

        def join(a):  # [chunks, B, n, K] -> [B, N, K]
            a = jnp.moveaxis(a, 0, 1)
            return a.reshape(a.shape[0], -1, a.shape[-1])[:, : completions.shape[1]]

        return jax.tree.map(join, jax.lax.map(chunk, _chunks(hidden, loss_chunk)))

    return score


def write_cache(
    folder: str | Path,
    *,
    model: LanguageModel,
    batches: Iterable[PromptBatch],
    top_k: int,
    tokenizer: Any,
    teacher: str = "",
    vocab_size: int | None = None,
    temperature: float = 1.0,
    loss_chunk: int = 512,
    max_shard_bytes: int = 2**28,
    sharding: jax.sharding.Sharding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "TeacherCache":
    """Scores demonstrations by the teacher and writes its top-k log-probs of every completion token.

    An interrupted call is resumed by calling again with the same arguments: what complete shards hold is not
    scored again, and KeyboardInterrupt writes what is there. `index.json` comes last; without it, the folder
    is not a cache. Calling again with more examples adds them.

    Args:
        folder: where to; made if missing.
        model: the teacher, an nnx module; its parameters anywhere.
        batches: prompts with completions, each example once, such as `prompts.take(rows)` of all rows of
            `tasks.Prompts`. Where they have a context, that is what the teacher sees. Examples that come
            again are skipped. All batches should be of one shape, the last may be shorter.
        top_k: K, tokens kept at each position.
        tokenizer: the `transformers` tokenizer of the batches, or its `tokenizer_fingerprint`.
        teacher: a name for the teacher, kept in the index.
        vocab_size: tokens that teacher and student share, where they are padded differently; None: all of
            the teacher's.
        temperature: T, divides the teacher's logits.
        loss_chunk: tokens whose logits exist on a device at a time.
        max_shard_bytes: of a file's arrays, except that one example is never split.
        sharding: of the batches' rows, on a mesh.
        progress: called with (examples, tokens), earlier calls included, on resuming and after every batch.

    Returns:
        The cache, opened.

    Raises:
        ValueError: if there is no example, a batch has no completions, a completion is empty, an example
            comes again with other tokens, the teacher's log-probs are not finite, K is out of range, or the
            folder holds a cache of another teacher, tokenizer or K.
        OSError: if a shard cannot be written; those before are kept.
    """
    if jax.process_count() > 1:
        raise ValueError("the cache is written by one process; start a single one")
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("there is no example to score")
    graphdef, params = nnx.split(model)
    width = _width(graphdef, params, _rows(first))
    vocab_size = width if vocab_size is None else vocab_size
    if not 1 <= top_k <= vocab_size <= width:
        raise ValueError(
            f"need 1 <= top_k <= vocab_size <= {width}, the teacher's logits; got top_k {top_k}, "
            f"vocab_size {vocab_size}"
        )
    settings = {
        "top_k": top_k,
        "vocab_size": vocab_size,
        "temperature": float(temperature),
        "tokenizer": tokenizer if isinstance(tokenizer, str) else tokenizer_fingerprint(tokenizer),
        "weights": _weights_fingerprint(params),
    }
    shards = ShardWriter(Path(folder), settings, max_shard_bytes)
    score = make_cache_score(
        graphdef, top_k=top_k, vocab_size=vocab_size, temperature=temperature, loss_chunk=loss_chunk
    )

    size = _divisible(len(first.ids), sharding)

    def run(rows):
        rows = _padded(rows, size)
        return score(params, *(rows if sharding is None else jax.device_put(rows, sharding)))

    if progress is not None and shards.examples:
        progress(shards.examples, shards.tokens)
    try:
        for batch, fresh, hashes, out in _one_ahead(_scored(chain([first], batches), shards, run)):
            _store(shards, batch, fresh, hashes, out)
            if progress is not None:
                progress(shards.examples, shards.tokens)
    except KeyboardInterrupt:
        shards.flush()
        raise
    shards.finish(teacher)
    return TeacherCache.open(folder)


def _scored(batches: Iterable[PromptBatch], shards: ShardWriter, run: Callable) -> Iterator[tuple]:
    """Starts scoring the batches that hold examples the shards do not."""
    for batch in batches:
        rows = _rows(batch)
        hashes = _hashes(batch)
        fresh = [i for i, pair in enumerate(zip(batch.ids, hashes, strict=True)) if shards.claim(*pair)]
        if fresh:
            yield batch, fresh, hashes, run(rows)


def _one_ahead(items: Iterator[tuple]) -> Iterator[tuple]:
    """Each item once the next one has been started: the device works while the host writes."""
    before = next(items, None)
    for item in items:
        yield before
        before = item
    if before is not None:
        yield before


def _store(shards: ShardWriter, batch: PromptBatch, fresh: list[int], hashes: list[int], out: tuple) -> None:
    support, categories = map(np.asarray, out)
    complete = support.shape[-1] == shards.settings["vocab_size"]  # then the tail is empty, its log -inf
    for i in fresh:
        rows = slice(int(batch.completion_lengths[i]))
        mine = categories[i, rows]
        finite = np.isfinite(mine[:, :-1] if complete else mine).all(-1)
        if not finite.all():
            raise ValueError(
                f"example {batch.ids[i]}: the teacher's log-probs at completion token "
                f"{int(np.argmin(finite))} are not finite; see whether the model is whole, or lower top_k or "
                "vocab_size if it gives tokens no probability at all"
            )
        shards.add(int(batch.ids[i]), hashes[i], support[i, rows], mine[:, :-1], mine[:, -1])


def _rows(batch: PromptBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the teacher sees: prompts [B, P], their lengths [B], completions [B, N]."""
    if batch.completions is None or batch.completion_lengths is None:
        raise ValueError("the batches have no completions; give Prompts a max_completion_length")
    if not (np.asarray(batch.completion_lengths) > 0).all():
        empty = batch.ids[int(np.argmin(batch.completion_lengths))]
        raise ValueError(f"the completion of example {empty} is empty")
    if batch.context_tokens is not None:
        return batch.context_tokens, batch.context_lengths, batch.completions
    return batch.tokens, batch.lengths, batch.completions


def _hashes(batch: PromptBatch) -> list[int]:
    """Of what the teacher sees of each example, padding apart; 64 bits."""
    prompts, lengths, completions = _rows(batch)
    found = []
    for prompt, n, completion, m in zip(prompts, lengths, completions, batch.completion_lengths, strict=True):
        tokens = np.concatenate([[n, m], prompt[:n], completion[:m]]).astype("<i4")
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
        found.append(int.from_bytes(digest, "little"))
    return found


def _divisible(size: int, sharding: jax.sharding.Sharding | None) -> int:
    """The least number of rows, at least `size`, that can be laid out: a small data set may not divide."""
    while sharding is not None:
        try:
            sharding.shard_shape((size,))
            break
        except ValueError:
            size += 1
    return size


def _padded(rows: tuple[np.ndarray, ...], size: int) -> tuple[np.ndarray, ...]:
    """A short last batch in the shape of the others, which is compiled already."""
    missing = size - len(rows[0])
    return tuple(np.concatenate([a, np.repeat(a[:1], missing, axis=0)]) if missing > 0 else a for a in rows)


def _width(graphdef: nnx.GraphDef, params: Any, rows: tuple[np.ndarray, ...]) -> int:
    def logits(params, *rows):
        model = nnx.merge(graphdef, params)
        return unembed(model, completion_states(model, *rows))

    return jax.eval_shape(logits, params, *rows).shape[-1]


def _weights_fingerprint(params: Any) -> str:
    leaves = {jax.tree_util.keystr(path): a for path, a in jax.tree_util.tree_leaves_with_path(params)}
    sums = {name: [str(leaves[name].dtype), int(value)] for name, value in checksums(leaves).items()}
    return hashlib.sha256(json.dumps(sorted(sums.items())).encode()).hexdigest()[:32]


class TeacherCache:
    """A folder that `write_cache` has completed, read as needed.

    Attributes:
        top_k: K.
        vocab_size: tokens that the law ranges over.
        temperature: that divided the teacher's logits.
        teacher: the name given to the teacher.
        ids: [n] int64, the examples, sorted.
    """

    def __init__(self, folder: Path, index: dict[str, Any], shards: list[Shard]):
        self.folder, self._shards = folder, shards
        self.settings = index["settings"]
        self.top_k, self.vocab_size = self.settings["top_k"], self.settings["vocab_size"]
        self.temperature, self.teacher = self.settings["temperature"], index["teacher"]
        ids = np.concatenate([shard.ids for shard in shards])
        order = np.argsort(ids, kind="stable")
        self.ids = ids[order]
        sizes = [len(shard.ids) for shard in shards]
        places = [np.repeat(np.arange(len(shards)), sizes), np.concatenate([np.arange(n) for n in sizes])]
        self._places = np.stack(places, axis=1)[order]
        if (np.diff(self.ids) == 0).any():
            raise ValueError(f"{folder} holds example {self.ids[np.argmin(np.diff(self.ids))]} twice")

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        tokenizer: Any = None,
        vocab_size: int | None = None,
        top_k: int | None = None,
        temperature: float | None = None,
    ) -> "TeacherCache":
        """Opens a cache, and checks that it is whole and what the run needs.

        Args:
            folder: of `write_cache`.
            tokenizer: the run's, or its fingerprint; None: not compared, like the rest.
            vocab_size: of the student's logits, which must reach as far as the cache's.
            top_k: K that the run asks for.
            temperature: T of the run's loss.

        Raises:
            ValueError: if the cache is incomplete or damaged, or does not fit; what would be right.
        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise ValueError(
                f"{folder} is no complete teacher cache: it has no {INDEX}, which is written last; run "
                "opd-jax cache-teacher (again: it goes on where it stopped)"
            )
        index = read_json(folder, INDEX)
        try:
            settings = {k: index["settings"][k] for k in ("top_k", "vocab_size", "temperature", "tokenizer")}
            files = [(entry["file"], entry["bytes"]) for entry in index["shards"]]
            if index["format"] != 1 or not files or not isinstance(index["teacher"], str):
                raise KeyError("format")
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is not the index of a teacher cache: {error}") from error
        if tokenizer is not None and not isinstance(tokenizer, str):
            tokenizer = tokenizer_fingerprint(tokenizer)
        for name, wanted in (("top_k", top_k), ("temperature", temperature), ("tokenizer", tokenizer)):
            if wanted is not None and wanted != settings[name]:
                raise ValueError(f"{folder} was made with {name} {settings[name]}, this run has {wanted}")
        if vocab_size is not None and vocab_size < settings["vocab_size"]:
            raise ValueError(
                f"{folder} was made with a vocabulary of {settings['vocab_size']} tokens, the student has "
                f"{vocab_size}; make it with vocab_size {vocab_size}"
            )
        return cls(folder, index, [Shard(folder, *file, index["settings"]) for file in files])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, ids: Sequence[int] | np.ndarray) -> Cached:
        """Of the given examples, padded to the longest. The caller vouches for their tokens; see `lookup`."""
        return self._take(np.asarray(ids, np.int64).reshape(-1), None, None)

    def lookup(self, batch: PromptBatch) -> Cached:
        """Of a batch of B prompts with completions [B, N], in its shape.

        Raises:
            ValueError: if an example is not in the cache, was scored with another prompt or completion, or
                its entry is damaged.
        """
        return self._take(batch.ids, _hashes(batch), batch.completions.shape[1])

    def _take(self, ids: np.ndarray, hashes: list[int] | None, width: int | None) -> Cached:
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        if (self.ids[places] != ids).any():
            missing = ids[self.ids[places] != ids]
            raise ValueError(
                f"example {missing[0]} ({len(missing)} of these {len(ids)}) is not in {self.folder}, which "
                f"holds {len(self)}; make the cache from the same data set and limits"
            )
        found = [(self._shards[shard], int(row)) for shard, row in self._places[places]]
        for i, (shard, row) in enumerate(found):
            if hashes is not None and hashes[i] != int(shard.hashes[row]):
                raise ValueError(
                    f"example {ids[i]} has other tokens than those the teacher scored in {self.folder}: its "
                    "prompt (template, chat template, context) or completion has changed; make it again"
                )
        rows = [shard.read(row) for shard, row in found]
        shape = len(rows), max(len(tail) for *_, tail in rows) if width is None else width
        # Padding is a law, too: a loss of it is finite, whatever is done with the mask.
        out = Cached(
            np.broadcast_to(np.arange(self.top_k, dtype=np.int32), (*shape, self.top_k)).copy(),
            np.full((*shape, self.top_k), -np.log(self.top_k + 1), np.float32),
            np.full(shape, -np.log(self.top_k + 1), np.float32),
        )
        for i, row in enumerate(rows):
            for array, values in zip(out, row, strict=True):
                array[i, : len(values)] = values
        return out
