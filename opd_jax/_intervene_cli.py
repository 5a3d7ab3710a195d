"""opd-jax intervene."""

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_jax._extras import require

_EPILOG = """
An experiment edits the weights and scores each edit: sampled accuracy on --source, or with --teacher the KL
to it on rollouts of the base for the prompts of --source. Edits stay in memory. The same command again goes
on where a stopped one was, and is instant once all is evaluated.

  opd-jax intervene --base BASE --tuned CKPT --source arithmetic --out interventions
  opd-jax intervene --base BASE --tuned CKPT --experiments truncate --source data.jsonl --out interventions \\
    --save truncate/top=10%
"""
_CONTEXT, _JOURNAL = "interventions.json", "interventions.jsonl"


def intervene(argv: Sequence[str]) -> None:
    """The command `opd-jax intervene`.

    Raises:
        ValueError: on arguments or checkpoints that make no sense.
    """
    options = _parser().parse_args(list(argv))
    _check(options)
    out = Path(options.out).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    from opd_jax import analysis
    from opd_jax._intervene_score import read
    from opd_jax.parallel import make_mesh

    mesh = make_mesh()
    sampling, about = _sampling(options, mesh)
    paths = [options.tuned, options.early]
    evaluator, (base, tuned, early) = read(options.base, paths, dtype=options.dtype, mesh=mesh, say=_say)
    wanted = analysis.edits(
        base.params,
        tuned.params,
        early=None if early is None else early.params,
        experiments=options.experiments,
        alphas=options.alphas,
        half_width=options.half_width,
        percents=options.percents,
        betas=options.betas,
    )
    saved = _saved(options.save, wanted, out)
    bar = analysis.Bar()
    progress = _Progress(bar)
    score, more = _score(options, evaluator, base, sampling, progress.inside)
    context = {
        "base_path": base.path,
        "tuned_path": tuned.path,
        "base": base.digest(),
        "tuned": tuned.digest(),
    }
    known = _Journal(out, context | about | more, "" if early is None else early.digest())
    with bar:
        tables = analysis.intervene(
            base.params, wanted, score, repeats=options.repeats, known=known, progress=progress
        )
    _write(out, tables)
    print(summary(tables, about["score"]))
    print(f"tables: {out / 'tables'}")
    for edit, folder in saved:
        _save(edit, folder, tuned)
        print(f"{edit.name}: {folder}")


class _Progress:
    """What the bar shows: evaluations, and the part of the current one that is done."""

    def __init__(self, bar: Any):
        self._bar, self._now = bar, ("", 0.0, 0.0)

    def __call__(self, what: str, done: float, total: float) -> None:
        self._now = what, done, total
        self._bar(what, done, total)

    def inside(self, share: float) -> None:
        what, done, total = self._now
        if share < 1:
            self._bar(what, done + share, total)


class _Journal(dict):
    """Evaluations by (content of the edit, repeat), each appended to a file as it is made.

    Args:
        folder: of the results; made if missing.
        context: what all evaluations in a folder have in common.
        early: digest of the early checkpoint, which only some edits depend on.

    Raises:
        ValueError: if the folder holds evaluations of other weights, or by another score.
    """

    def __init__(self, folder: Path, context: dict[str, Any], early: str):
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._early = folder / _JOURNAL, early
        _same_context(folder / _CONTEXT, context)
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                key, found = (entry["edit"], entry["repeat"]), (entry["values"], entry["norm"])
            except (ValueError, KeyError, TypeError):
                continue  # cut off by what stopped the command
            if not self._of_early(key[0]) or entry.get("early") == early:
                super().__setitem__(key, found)
        if text and not text.endswith("\n"):
            self._append("\n")

    def __setitem__(self, key: tuple[str, int], value: tuple[Sequence[float], float]) -> None:
        super().__setitem__(key, value)
        entry = {"edit": key[0], "repeat": key[1], "norm": value[1], "values": list(value[0])}
        if self._of_early(key[0]):
            entry["early"] = self._early
        self._append(json.dumps(entry, separators=(",", ":")) + "\n")

    @staticmethod
    def _of_early(edit: str) -> bool:
        return edit.split()[0] in ("early", "norms")

    def _append(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _same_context(path: Path, context: dict[str, Any]) -> None:
    """Writes down what evaluations depend on, or compares with what an earlier command wrote."""
    if not path.exists():
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(context, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in context if before.get(name) != context[name]]
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is damaged; remove it and {_JOURNAL}, or give another --out") from None
    labels = [name for name in differing if not name.endswith("_path")]
    if labels:
        name = labels[0]
        raise ValueError(
            f"--out {path.parent} holds evaluations with another {', '.join(labels)} ({name} was "
            f"{_short(before.get(name))}, now it is {_short(context[name])}); give another --out"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:16] + '..."'


def _sampling(options, mesh) -> tuple[Any, dict[str, Any]]:
    """What is sampled, and what its scores depend on; all that can be checked without weights is checked."""
    from opd_jax import models, tasks
    from opd_jax._intervene_score import Sampling, tokenizer_folder
    from opd_jax.parallel import row_shards
    from opd_jax.training._pair import check_pair

    folder = tokenizer_folder(options.tuned, options.base)
    tokenizer = models.load_tokenizer(folder)
    stops = models.stop_token_ids(folder, tokenizer)
    if options.teacher is not None:
        theirs = models.load_tokenizer(options.teacher)
        their_stops = models.stop_token_ids(options.teacher, theirs)
        check_pair(tokenizer, theirs, stops=stops, teacher_stops=their_stops, chat=options.chat == "auto")
    rows = row_shards(mesh)
    prompts = tasks.Prompts(
        tasks.load(options.source, options=options.options, verifier=options.verifier),
        tokenizer,
        batch_size=-(-options.batch_size // rows) * rows,
        max_prompt_length=options.max_prompt_length,
        chat=options.chat,
        shuffle=False,
        limit=options.prompts,
    )
    if prompts.dropped:
        _say(f"{prompts.dropped} prompts longer than {options.max_prompt_length} tokens are left out")
    batch = prompts.take(range(len(prompts)))
    content = [batch.tokens.tolist(), batch.lengths.tolist(), [str(e.answer) for e in batch.examples]]
    about = {
        "score": "accuracy" if options.teacher is None else "kl",
        "source": options.source,
        "verifier": options.verifier,
        "task": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "prompts": len(prompts),
        "stops": list(stops),
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
    }
    how = Sampling(prompts, stops, options.max_new_tokens, options.temperature, options.seed)
    return how, about


def _score(options, evaluator, base, sampling, tell) -> tuple[Any, dict[str, Any]]:
    """The score, and what else it depends on."""
    from flax import nnx

    from opd_jax import models
    from opd_jax._intervene_score import Accuracy, Divergence, digest

    if options.teacher is None:
        return Accuracy(evaluator, sampling, tell), {}
    _say(f"loading {options.teacher}")
    teacher = models.load(options.teacher, dtype=options.dtype, mesh=evaluator.mesh)
    score = Divergence(evaluator, base.params, teacher, sampling, tell)
    return score, {"teacher_path": options.teacher, "teacher": digest(nnx.state(teacher))}


def summary(tables: dict[str, list[dict[str, Any]]], score: str) -> str:
    """The rows as text, with the share of the gain from base to tuned that an edit has."""
    ends = {row["setting"]: row["score"] for rows in tables.values() for row in rows}
    low, high = (ends.get(a, ends.get(b, math.nan)) for a, b in (("base", "alpha=0"), ("tuned", "alpha=1")))
    lines = []
    for name, rows in tables.items():
        lines.append(f"{name:24} {score:>9} {'error':>8} {'norm':>9} {'gain':>6}")
        for row in rows:
            share = (row["score"] - low) / (high - low) + 0.0 if high != low else math.nan  # no -0%
            words = f"  {row['setting']:22} {row['score']:9.4f} {row['error']:8.4f} {row['norm']:9.4g}"
            lines.append(words + (f" {share:6.0%}" if math.isfinite(share) else ""))
    return "\n".join(lines)


def _write(out: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    from opd_jax.analysis._result import _plain, _write, _write_csv

    (out / "tables").mkdir(exist_ok=True)
    for name, table in tables.items():
        _write_csv(out / "tables" / f"intervention_{name}.csv", table)
        _write(out / "tables" / f"intervention_{name}.json", json.dumps(_plain(table), allow_nan=False))


def _saved(names: Sequence[str], wanted: list, out: Path) -> list[tuple[Any, Path]]:
    """The edits to save, and where to."""
    known = {edit.name: edit for edit in wanted}
    for name in names:
        if name not in known:
            raise ValueError(f"--save {name} is no edit of this command; there are {', '.join(known)}")
    return [(known[n], out / "models" / re.sub(r"[^\w.=-]+", "-", n.replace("%", ""))) for n in names]


def _save(edit, folder: Path, like) -> None:
    """Writes the edited weights as a model folder."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from opd_jax import models

    params = jax.tree.map(jnp.asarray, edit.make())
    dtype = jax.tree.leaves(params)[0].dtype
    graphdef = nnx.graphdef(models.abstract(models.load_config(like.folder), dtype))
    models.save(nnx.merge(graphdef, params), folder)


def _check(options: argparse.Namespace) -> None:
    """What can be said before anything is loaded."""
    from opd_jax.analysis import EXPERIMENTS

    if options.experiments is not None:
        options.experiments = [word for word in options.experiments.split(",") if word]
        if unknown := [name for name in options.experiments if name not in EXPERIMENTS]:
            raise ValueError(f"--experiments: no {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
        if not options.experiments:
            raise ValueError(f"--experiments is empty; there are {', '.join(EXPERIMENTS)}")
        if "norms" in options.experiments and options.early is None:
            raise ValueError("--experiments norms needs --early, a checkpoint whose updates it makes longer")
        if options.early is not None and "norms" not in options.experiments:
            raise ValueError("--early is for the experiment norms, which --experiments does not name")
    for name in ("alphas", "percents", "betas"):
        setattr(options, name, _numbers(getattr(options, name), "--" + name))
    if bad := [p for p in options.percents if not 0 < p <= 100]:
        raise ValueError(f"--percents must be above 0 and at most 100, got {bad[0]:g}")
    if options.repeats is None:
        options.repeats = 4 if options.teacher is None else 1
    for name, least in (("half_width", 0), ("repeats", 1), ("prompts", 2), ("batch_size", 1)):
        if getattr(options, name) < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} must be at least {least}, got {getattr(options, name)}")
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        raise ValueError(f"--temperature must be 0 or more, got {options.temperature}")
    text = options.options
    options.options = require("yaml").safe_load(text)
    if not isinstance(options.options, dict):
        raise ValueError(f"--options must be a mapping such as '{{seed: 3}}', got {text!r}")


def _numbers(text: str, option: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be numbers with commas between them") from None
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"{option} {text!r} must be finite numbers, at least one")
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    from opd_jax.analysis import EXPERIMENTS
    from opd_jax.analysis._intervene import ALPHAS, BETAS, HALF_WIDTH, PERCENTS

    def listed(values: Sequence[float]) -> str:
        return ",".join(f"{value:g}" for value in values)

    parser = argparse.ArgumentParser(
        prog="opd-jax intervene",
        description="Which part of W - W_base carries what training taught: edited weights, scored.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", required=True, help="the checkpoint that training began from")
    add("--tuned", required=True, help="what it led to; also a run folder, or a LoRA adapter of the base")
    add("--early", help="an early checkpoint, for the experiment norms")
    add("--experiments", metavar="A,B", help=f"of {', '.join(EXPERIMENTS)} (all; norms only with --early)")
    add("--source", required=True, help="the task, as opd-jax evaluate takes it")
    add("--options", default="{}", help="keyword arguments of the source, as YAML: '{seed: 3}'")
    add("--verifier", help="exact, contains, math or package.module:function")
    add("--teacher", help="score by the KL to this model instead of accuracy")
    add("--out", required=True, help=f"folder for tables/intervention_*.csv and .json, and {_JOURNAL}")
    add(
        "--save",
        action="append",
        default=[],
        metavar="EXPERIMENT/SETTING",
        help="write that edit's weights to OUT/models",
    )
    add("--alphas", default=listed(ALPHAS), help=f"of scale ({listed(ALPHAS)})")
    add("--half-width", type=int, default=HALF_WIDTH, help=f"of windows, in layers ({HALF_WIDTH})")
    add("--percents", default=listed(PERCENTS), help=f"of truncate ({listed(PERCENTS)})")
    add("--betas", default=listed(BETAS), help=f"of norms ({listed(BETAS)})")
    add("--repeats", type=int, help="evaluations of each edit, averaged (4; 1 with --teacher)")
    add("--prompts", type=int, default=512, help="how many, from the first (512)")
    add("--max-new-tokens", type=int, default=256, help="a completion (256)")
    add("--max-prompt-length", type=int, default=512, help="longer prompts are left out (512)")
    add("--temperature", type=float, default=1.0, help="of the sampling (1)")
    add("--batch-size", type=int, default=64, help="completions at once (64)")
    add("--seed", type=int, default=0, help="of the sampling; repeat r draws with seed + r (0)")
    add("--chat", choices=("auto", "never"), default="auto", help="whether to use the chat template (auto)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (as stored)")
    return parser
