"""opd-jax train | plan | cache-teacher | analyze | intervene | evaluate | generate."""

import argparse
import json
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from opd_jax._extras import require

_USAGE = """usage: opd-jax COMMAND ...

  train CONFIG [--run_dir DIR] [--dotted.key VALUE ...]
                      runs a config (YAML), or goes on with a run that was stopped
  plan CONFIG --topology v5e:4x4 [--dotted.key VALUE ...]
                      compiles a config's programs for a TPU slice, or what is here, and runs nothing:
                      memory, FLOPs, messages, least time
  cache-teacher CONFIG [--dotted.key VALUE ...]
                      lets the teacher of a config score the data's completions once, into teacher.cache
  analyze --base PATH --run NAME=PATH[,PATH ...] --out DIR
                      what training did to the weights: spectra, trajectories, tables
  intervene --base PATH --tuned PATH --source SOURCE --out DIR
                      which part of it matters: edited weights, scored on a task or by KL to a teacher
  evaluate --model PATH --source SOURCE ...
                      sampled accuracy of any supported model on a task
  generate --model PATH --prompt TEXT ...
                      completions of prompts

PATH is a Hugging Face folder, a hub id or a GGUF file. `opd-jax COMMAND --help` says more.
"""
_TRAIN_USAGE = """usage: opd-jax train CONFIG [--run_dir DIR] [--dotted.key VALUE ...]

Runs the config in DIR (default: runs/<name of CONFIG>). The same command again goes on with a stopped run.
Every key of the config can be given: --steps 10, --student.path PATH, --data.options.seed 3.
Keys are documented in opd_jax/config.py; examples are in configs/.

On many hosts, the same command on each, with DIR on a file system that all share:
  --distributed                       on Cloud TPU, SLURM and Kubernetes, which tell who takes part
  --coordinator_address HOST:PORT --num_processes N --process_id I
                                      elsewhere; HOST is that of process 0
  --initialization_timeout 300        seconds to wait for all at the start
  --heartbeat_timeout_seconds 100     without a sign of life from a process, all others end
"""
_HOSTS = {
    "coordinator_address": str,
    "num_processes": int,
    "process_id": int,
    "initialization_timeout": int,
    "heartbeat_timeout_seconds": int,
}


_RESUMES = ("train", "cache-teacher", "intervene")


def main(argv: list[str] | None = None) -> int:
    """The `opd-jax` command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "train": _train,
        "plan": _plan,
        "cache-teacher": _cache_teacher,
        "analyze": _analyze,
        "intervene": _intervene,
        "evaluate": _evaluate,
        "generate": _generate,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if argv else 2
    if argv[0] not in commands:
        print(f"opd-jax: no command {argv[0]!r}; there are {', '.join(commands)}", file=sys.stderr)
        return 2
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses torch; we do not
    return _guarded(commands[argv[0]], argv)


def _guarded(command: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a command; what a user can mend is told in words, anything else as a traceback."""
    from opd_jax import parallel
    from opd_jax.training import Interrupted, TrainingError

    try:
        command(argv[1:])
        return 0
    except Interrupted as stopped:
        print(f"{stopped}. To go on:\n  opd-jax {shlex.join(argv)}", file=sys.stderr)
        parallel.leave(stopped)
        return 130
    except KeyboardInterrupt as stopped:
        go_on = f". To go on:\n  opd-jax {shlex.join(argv)}" * (argv[0] in _RESUMES)
        print(f"stopped at once{go_on}", file=sys.stderr)
        parallel.leave(stopped)
        return 130
    except (ValueError, OSError, ImportError, TrainingError) as error:
        if os.environ.get("OPD_JAX_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {error}\n(OPD_JAX_TRACEBACK=1 shows where)", file=sys.stderr)
        parallel.leave(error)
        return 1
    except Exception as error:
        if parallel.several():
            traceback.print_exc()
            parallel.leave(error)
        raise


_CACHE_USAGE = """usage: opd-jax cache-teacher CONFIG [--dotted.key VALUE ...]

Scores the completions of CONFIG's data set by its teacher and writes the most likely tokens of each position
to the folder teacher.cache. `opd-jax train CONFIG` then reads them and needs no teacher in memory. The same
command again goes on where it was stopped.
"""


def _no_config(argv: list[str], usage: str) -> None:
    """Prints the usage and leaves, if that is asked for or no config is given."""
    help_asked = bool({"-h", "--help"} & set(argv))
    if help_asked or not argv or argv[0].startswith("-"):
        print(usage, end="")
        raise SystemExit(0 if help_asked else 2)


def _cache_teacher(argv: list[str]) -> None:
    _no_config(argv, _CACHE_USAGE)
    from opd_jax import config, training

    folder = training.cache_teacher(config.load(argv[0], argv[1:]))
    print(f"the teacher's opinions are in {folder}; opd-jax train {argv[0]} reads them")


def _plan(argv: list[str]) -> None:
    from opd_jax._plan_cli import plan

    plan(argv)


def _analyze(argv: list[str]) -> None:
    from opd_jax._analyze_cli import analyze

    analyze(argv)


def _intervene(argv: list[str]) -> None:
    from opd_jax._intervene_cli import intervene

    intervene(argv)


def _train(argv: list[str]) -> None:
    _no_config(argv, _TRAIN_USAGE)
    from opd_jax import config, parallel, training

    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax: pages of what we say in a line
    overrides = _join(argv[1:])
    settings = parallel.together(lambda: config.load(argv[0], overrides))
    result = training.train(settings)
    if parallel.is_first():
        print(_summary(result, settings.data.chat))


def _join(words: list[str]) -> list[str]:
    """Joins the other processes of a run, if the words ask for it; gives the words that are left."""
    from opd_jax import parallel

    parser = argparse.ArgumentParser(prog="opd-jax train", allow_abbrev=False, add_help=False)
    parser.add_argument("--distributed", action="store_true")
    for name, kind in _HOSTS.items():
        parser.add_argument(f"--{name}", type=kind)
    given, rest = parser.parse_known_args(words)
    asked = {name: value for name in _HOSTS if (value := getattr(given, name)) is not None}
    if given.distributed or asked:
        parallel.start(**asked)
    return rest


def _summary(result, chat: str) -> str:
    lines = []
    if result.after:
        before, after = result.before, result.after
        lines.append(
            f"accuracy on held-out prompts: {before['accuracy']:.3f} +- {before['accuracy_error']:.3f} "
            f"before, {after['accuracy']:.3f} +- {after['accuracy_error']:.3f} after"
        )
    if result.teacher and result.after:
        gain = result.teacher["accuracy"] - before["accuracy"]
        lines.append(
            f"teacher: {result.teacher['accuracy']:.3f} +- {result.teacher['accuracy_error']:.3f}"
            + (
                f"; the student has {(after['accuracy'] - before['accuracy']) / gain:.0%} of its gain"
                * (gain > 0)
            )
        )
    if result.reached:
        lines.append(
            f"target reached at step {result.reached[0]}, after {result.reached[1]} completion tokens"
        )
    if result.searches:
        accepted, seconds, tokens = result.searches
        share = seconds / result.seconds if result.seconds else 0.0
        lines.append(
            f"extrapolation: {accepted} jumps; its searches took {seconds:.1f} s ({share:.0%} of the steps' "
            f"time) and {tokens} tokens"
        )
    lines.append(f"{result.tokens} completion tokens in {result.seconds:.0f} s of training steps")
    prompt = shlex.quote(result.prompt) if len(result.prompt) < 200 else "..."
    prompt += " --chat never" * (chat == "never")
    lines.append(f"model: {result.model}")
    if (result.model / "adapter_config.json").exists():
        lines.append("that is an adapter: opd_jax.models.load_lora, or peft, puts it on its base model")
    else:
        lines.append(f"sample from it: opd-jax generate --model {result.model} --prompt {prompt}")
    return "\n".join(lines)


def _generate(argv: list[str]) -> None:
    require("tyro").cli(generate, args=argv, prog="opd-jax generate")


def _evaluate(argv: list[str]) -> None:
    require("tyro").cli(evaluate, args=argv, prog="opd-jax evaluate")


def generate(
    model: str,
    prompt: tuple[str, ...],
    max_new_tokens: int = 256,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: tuple[str, ...] = (),
    seed: int = 0,
    chat: Literal["auto", "never"] = "auto",
    dtype: Literal["float32", "bfloat16"] | None = None,
    as_json: bool = False,
) -> None:
    """Completions of prompts.

    Args:
        model: a Hugging Face folder, a hub id or a GGUF file.
        prompt: one or more prompts.
        max_new_tokens: in tokens, a completion.
        samples: completions of each prompt.
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens up to this mass.
        min_p: keep tokens at least so likely, relative to the most likely one.
        stop: strings that end a completion.
        seed: of the sampling.
        chat: whether prompts pass through the tokenizer's chat template.
        dtype: of the weights; as stored by default.
        as_json: one JSON object a completion, with token ids and log-probs.
    """
    import jax
    import numpy as np

    from opd_jax import models, rollout, tasks
    from opd_jax.parallel import make_mesh

    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    sampling = rollout.Sampling(temperature, top_k, top_p, min_p)
    tokenizer = models.load_tokenizer(model)
    examples = [tasks.Example(prompt=text) for text in prompt]
    rows = [tasks.render(tokenizer, example, chat=chat) for example in examples for _ in range(samples)]
    result = rollout.generate(
        models.load(model, dtype=dtype, mesh=make_mesh()),
        rows,
        jax.random.key(seed),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_token_ids=models.stop_token_ids(model, tokenizer),
        stop_strings=stop,
        tokenizer=tokenizer,
    )
    ids = [
        np.asarray(c)[m].tolist() for c, m in zip(result.completions, np.asarray(result.mask), strict=True)
    ]
    for i, text in enumerate(tasks.decode(tokenizer, ids)):
        record = dict(prompt=prompt[i // samples], completion=text, finish=result.finish_reasons[i])
        if as_json:
            log_probs = np.asarray(result.log_probs[i])[: len(ids[i])]
            print(json.dumps(record | dict(tokens=ids[i], log_probs=log_probs.round(5).tolist())))
            continue
        if len(rows) > 1:
            print(f"--- {record['prompt']}")
        print(text + ("" if record["finish"] != "length" else " [...]"))


def evaluate(
    model: str,
    source: str,
    options: str = "{}",
    verifier: str | None = None,
    prompts: int = 512,
    samples: int = 1,
    pass_k: tuple[int, ...] = (1,),
    max_new_tokens: int = 256,
    max_prompt_length: int = 512,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    chat: Literal["auto", "never"] = "auto",
    dtype: Literal["float32", "bfloat16"] | None = None,
    out: Path | None = None,
) -> None:
    """Sampled accuracy of a model on a task, with its standard error over prompts.

    Args:
        model: a Hugging Face folder, a hub id or a GGUF file.
        source: arithmetic, reasoning-gym:NAME, package.module:function, or a .jsonl or .parquet file.
        options: keyword arguments of the source, as YAML: "{seed: 3, size: 100}".
        verifier: exact, contains, math or package.module:function; the source's own by default.
        prompts: how many, from the first.
        samples: completions of each prompt.
        pass_k: the k of pass@k.
        max_new_tokens: in tokens, a completion.
        max_prompt_length: longer prompts are dropped and counted.
        temperature: 0 takes the most likely token.
        batch_size: completions sampled at once.
        seed: of the sampling.
        chat: whether prompts pass through the tokenizer's chat template.
        dtype: of the weights; as stored by default.
        out: a JSONL file for the completions.
    """
    import jax

    from opd_jax import models, rollout, tasks
    from opd_jax.parallel import make_mesh
    from opd_jax.training._logging import Display

    settings = require("yaml").safe_load(options)
    if not isinstance(settings, dict):
        raise ValueError(f"options must be a mapping such as '{{seed: 3}}', got {options!r}")
    task = tasks.load(source, options=settings, verifier=verifier)
    tokenizer = models.load_tokenizer(model)
    held_out = tasks.Prompts(
        task,
        tokenizer,
        batch_size=batch_size,
        max_prompt_length=max_prompt_length,
        chat=chat,
        shuffle=False,
        limit=prompts,
    )
    with Display(0) as display:
        display.status(f"loading {model}")
        decoder = models.load(model, dtype=dtype, mesh=make_mesh())
        report = display.task("evaluating", len(held_out) * samples)
        result = tasks.evaluate(
            decoder,
            held_out,
            key=jax.random.key(seed),
            max_new_tokens=max_new_tokens,
            samples=samples,
            sampling=rollout.Sampling(temperature),
            stop_token_ids=models.stop_token_ids(model, tokenizer),
            pass_k=pass_k,
            on_progress=lambda done, total, _mean: report(done, total),
        )
    print(
        f"accuracy {result.accuracy:.4f} +- {result.standard_error:.4f} ({len(held_out)} prompts x {samples})"
    )
    for k, (value, error) in result.pass_at_k.items():
        print(f"pass@{k} {value:.4f} +- {error:.4f}")
    print(f"{result.mean_length:.1f} tokens a completion, {result.truncated:.1%} cut off at {max_new_tokens}")
    if held_out.dropped:
        print(f"{held_out.dropped} prompts longer than {max_prompt_length} tokens were dropped")
    if out is not None:
        with out.open("w", encoding="utf-8") as file:
            for r in result.records:
                line = dict(prompt=r.prompt, completion=r.completion, reward=r.reward, finish=r.finish)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
