"""The models of opd-jax intervene, and the scores that it gives to edits of them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from opd_jax import models, rollout, tasks
from opd_jax.analysis._checkpoints import _model_folder
from opd_jax.analysis._orbax import is_step, step_leaves
from opd_jax.models._tokenizer import VOCABULARIES
from opd_jax.parallel import batch_sharding
from opd_jax.training._pair import check_width
from opd_jax.training._step import Batch, make_measure, make_score
from opd_jax.transforms._matrices import path_name

_FREE = {"max_length", "bos_token_id", "eos_token_ids", "hf", "source"}
"""Of a configuration: what may differ between a base and what it was trained to."""


@dataclass
class Weights:
    """A model in memory.

    Attributes:
        path: as given.
        params: its state, numpy arrays on the host.
        folder: with the configuration and perhaps the tokenizer.
    """

    path: str
    params: Any
    folder: Path

    def digest(self) -> str:
        """Of the content."""
        return digest(self.params)


def digest(params: Any) -> str:
    """A hash of all arrays of a tree, with their names, shapes and dtypes."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.ascontiguousarray(leaf)
        found.update(f"{path_name(path)} {value.dtype} {value.shape}".encode())
        found.update(value.reshape(-1).view(np.uint8))
    return found.hexdigest()


class Evaluator:
    """The base's architecture with any weights, on the devices: one shape, one layout, one compilation.

    Args:
        model: the base, on the mesh.
        mesh: of the devices.
    """

    def __init__(self, model: models.Decoder, mesh: Mesh):
        self.mesh = mesh
        self.graphdef, params = nnx.split(model)
        self._shardings = jax.tree.map(lambda a: a.sharding, params)

    def place(self, params: Any) -> Any:
        """A tree of host arrays where the base's parameters were."""
        return jax.device_put(params, self._shardings)

    def model(self, params: Any) -> models.Decoder:
        """The model with these host arrays."""
        return nnx.merge(self.graphdef, self.place(params))


def read(
    base: str, others: Sequence[str | None], *, dtype: Any, mesh: Mesh, say: Callable[[str], None]
) -> tuple[Evaluator, list[Weights | None]]:
    """The base and the other checkpoints of its architecture, all in one dtype, and the base's evaluator.

    Args:
        base: a Hugging Face folder, a hub id or a run folder.
        others: likewise, or one of a run's `checkpoints`, or a LoRA adapter of the base, which is merged.
        dtype: None: as stored, or float32 where they differ, and with adapters, whose sum with 16-bit weights
            would be another model.
        mesh: where to place what is evaluated.
        say: told what happens.

    Raises:
        ValueError: if a checkpoint is damaged or of another architecture.
    """
    folders = [None if path is None else _model_folder(models.resolve(path)) for path in (base, *others)]
    whole = [folder for folder in folders if folder is not None and (folder / "config.json").exists()]
    if folders[0] not in whole:
        raise ValueError(f"--base {base} is not a model folder: it has no config.json")
    for folder in whole[1:]:
        _check_same(whole[0], folder)
    say(f"loading {base}")
    model = models.load(folders[0], dtype=dtype, mesh=mesh)
    rest = {}
    for path, folder in zip(others, folders[1:], strict=True):
        if folder in whole and path not in rest:
            say(f"loading {path}")
            rest[path] = _host(models.load(folder, dtype=dtype, mesh=mesh))
    mixed = len({jnp.dtype(each.embedding.dtype) for each in (model, *rest.values())}) > 1
    if dtype is None and (mixed or len(rest) < len({path for path in others if path is not None})):
        dtype = jnp.float32
        model, rest = _cast(model, dtype), {path: _cast(each, dtype) for path, each in rest.items()}
    for path, folder in zip(others, folders[1:], strict=True):
        if path is not None and path not in rest:
            say(f"loading {path}")
            rest[path] = _host(_on_base(model, folder, path))
    evaluator = Evaluator(model, mesh)
    found = [Weights(base, _params(_host(model)), folders[0])]
    for path, folder in zip(others, folders[1:], strict=True):
        own = folder if folder in whole else folders[0]
        found.append(None if path is None else Weights(path, _params(rest[path]), own))
    return evaluator, found


def tokenizer_folder(tuned: str, base: str) -> Path:
    """The folder whose tokenizer and stop tokens are used: the tuned model's, else the base's."""
    for path in (tuned, base):
        folder = _model_folder(models.resolve(path))
        if (folder / "config.json").exists() and any((folder / name).exists() for name in VOCABULARIES):
            return folder
    raise ValueError(f"neither {tuned} nor {base} has a tokenizer: none of {', '.join(VOCABULARIES)}")


def _on_base(model: models.Decoder, folder: Path, path: str) -> models.Decoder:
    """The base with an adapter merged into it, or with the parameters of a training step."""
    if not is_step(folder):
        if not (folder / "adapter_config.json").exists():
            raise ValueError(f"{path} holds neither a model (config.json) nor an adapter nor a training step")
        return models.merge_lora(models.load_lora(model, folder))
    graphdef, params = nnx.split(model)
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves, names = step_leaves(folder), [path_name(place) for place, _ in flat]
    if set(names) != leaves.keys():
        name = min(set(names) ^ leaves.keys())
        raise ValueError(f"{path} and the base differ: only one of them has {name}")
    values = []
    for name, (_, leaf) in zip(names, flat, strict=True):
        if leaves[name].shape != leaf.shape:
            raise ValueError(f"{path}: {name} is {leaves[name].shape}, in the base {leaf.shape}")
        values.append(np.asarray(leaves[name]).astype(leaf.dtype))
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, values))


def _check_same(base: Path, other: Path) -> None:
    one, two = (models.load_config(folder) for folder in (base, other))
    differing = [
        f"{f.name} is {getattr(one, f.name)} in {base} and {getattr(two, f.name)} in {other}"
        for f in fields(one)
        if f.name not in _FREE and getattr(one, f.name) != getattr(two, f.name)
    ]
    if differing:
        raise ValueError(f"the two are of different architectures: {'; '.join(differing)}")


def _host(model: models.Decoder) -> models.Decoder:
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(np.asarray, params))


def _cast(model: models.Decoder, dtype: Any) -> models.Decoder:
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(dtype), params))


def _params(model: models.Decoder) -> Any:
    return nnx.split(model)[1]


@dataclass
class Sampling:
    """How completions are sampled, for either score.

    Attributes:
        prompts: of a task.
        stops: ids that end a completion.
        max_new_tokens: in tokens, a completion.
        temperature: of the sampling.
        seed: repeat r draws with the key of seed + r, as `opd-jax evaluate --seed` does.
    """

    prompts: tasks.Prompts
    stops: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int

    def key(self, repeat: int) -> jax.Array:
        return jax.random.key(self.seed + repeat)


class Accuracy:
    """The verifier's opinion of one sampled completion of each prompt, by `tasks.evaluate`.

    Args:
        evaluator: of the model.
        sampling: see there.
        tell: called with the share of an evaluation that is done.
    """

    def __init__(self, evaluator: Evaluator, sampling: Sampling, tell: Callable[[float], None]):
        self._evaluator, self._sampling, self._tell = evaluator, sampling, tell

    def __call__(self, params: Any, repeat: int) -> np.ndarray:
        how = self._sampling
        result = tasks.evaluate(
            self._evaluator.model(params),
            how.prompts,
            key=how.key(repeat),
            max_new_tokens=how.max_new_tokens,
            sampling=rollout.Sampling(how.temperature),
            stop_token_ids=how.stops,
            on_progress=lambda done, total, _mean: self._tell(done / total),
        )
        return np.array([record.reward for record in result.records])


class Divergence:
    r"""KL(model || teacher) over the whole vocabulary, on rollouts of the base that stay as they are.

    .. math:: R = \sum_i S_i / \sum_i T_i, \qquad v_i = R + (S_i - R\, T_i) / \bar T

    with S_i the sum of a rollout's KL, in nats, and T_i its tokens. R, a mean over tokens, is what
    `foresight.extrapolate.score: kl` maximises the negative of; the mean of the v_i is R, and the standard
    error of that mean is R's as a ratio of means (delta method).

    Args:
        evaluator: of the model.
        base: parameters that write the rollouts.
        teacher: on the same mesh.
        sampling: see there.
        tell: called with the share of an evaluation that is done.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        base: Any,
        teacher: models.Decoder,
        sampling: Sampling,
        tell: Callable[[float], None],
    ):
        check_width("teacher", teacher.config.vocab_size, sampling.prompts.tokenizer)
        self._evaluator, self._base, self._how, self._tell = evaluator, base, sampling, tell
        graphdef, self._teacher = nnx.split(teacher)
        self._score = make_score(graphdef, micro_batches=1)
        self._measure = make_measure(evaluator.graphdef, [graphdef], dtype=None)
        self._kept: dict[int, list[tuple[Batch, np.ndarray, int]]] = {}

    def __call__(self, params: Any, repeat: int) -> np.ndarray:
        if repeat not in self._kept:
            self._kept[repeat] = self._rollouts(repeat)
        placed, sums, counts = self._evaluator.place(params), [], []
        with jax.set_mesh(self._evaluator.mesh):
            for batch, hidden, real in self._kept[repeat]:
                batch, hidden = jax.device_put((batch, hidden), batch_sharding(self._evaluator.mesh))
                kl = np.asarray(self._measure(placed, (self._teacher,), batch, (hidden,))["kl"], np.float64)
                mask = np.asarray(batch.mask)
                sums.append(np.where(mask, kl, 0).sum(-1)[:real])
                counts.append(mask.sum(-1)[:real])
                self._tell(sum(map(len, sums)) / len(self._how.prompts))
        sums, counts = np.concatenate(sums), np.concatenate(counts)
        ratio = sums.sum() / counts.sum()
        return ratio + (sums - ratio * counts) / counts.mean()

    def _rollouts(self, repeat: int) -> list[tuple[Batch, np.ndarray, int]]:
        """Batches of rollouts, the teacher's hidden states of them, and how many of their rows are real."""
        how, mesh = self._how, self._evaluator.mesh
        model, total = self._evaluator.model(self._base), len(how.prompts)
        found = []
        for first in range(0, total, how.prompts.batch_size):
            # The last batch is filled up by repetition, as by `tasks.evaluate`.
            rows = np.minimum(np.arange(first, first + how.prompts.batch_size), total - 1)
            prompts = how.prompts.take(rows)
            sampled = rollout.generate(
                model,
                prompts.tokens,
                how.key(repeat),
                prompt_lengths=prompts.lengths,
                max_new_tokens=how.max_new_tokens,
                sampling=rollout.Sampling(how.temperature),
                stop_token_ids=how.stops,
                row_ids=prompts.ids,
            )
            batch = Batch(prompts.tokens, prompts.lengths, sampled.completions, sampled.mask)
            batch = jax.device_put(batch, batch_sharding(mesh))
            with jax.set_mesh(mesh):
                hidden = np.asarray(self._score(self._teacher, batch))
            found.append((jax.tree.map(np.asarray, batch), hidden, min(len(rows), total - first)))
        return found
