"""opd-jax analyze."""

import argparse
from collections.abc import Sequence
from pathlib import Path

_EPILOG = """
A checkpoint is a Hugging Face folder, a hub id, a run folder of `opd-jax train`, a LoRA adapter of the
base, or a folder of checkpoint folders. Steps are read from names such as checkpoint-100, global_step_20.
Results are kept by content: the same command again is instant, a stopped one goes on. What `opd-jax
intervene` has written into the same --out becomes a section of the report.

  opd-jax analyze --base Qwen/Qwen3-8B --run opd=out/checkpoint-10,out/checkpoint-100 --out analysis
"""


def analyze(argv: Sequence[str]) -> None:
    """The command `opd-jax analyze`.

    Raises:
        ValueError: on arguments or checkpoints that make no sense.
    """
    options = _parser().parse_args(list(argv))
    from opd_jax import analysis

    runs = dict(_pair(text, "--run") for text in options.run)
    if len(runs) < len(options.run):
        raise ValueError("two runs have the same name; give each its own: --run NAME=CKPT")
    runs = {name: value.split(",") for name, value in runs.items()}
    steps = {name: _numbers(v, int, "--steps") for name, v in _named(options.steps, runs, "--steps")}
    values = {name: _numbers(v, float, "--scores") for name, v in _named(options.scores, runs, "--scores")}
    out = Path(options.out).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    cache = None if options.cache == "none" else options.cache
    keywords = {} if options.cache == "" else {"cache": cache}
    with analysis.Bar() as bar:
        result = analysis.analyze(
            options.base, runs, steps=steps, k=options.k, workers=options.workers, progress=bar, **keywords
        )
    if values:
        result = analysis.with_scores(result, values)
    result = analysis.with_interventions(result, out)
    result.write(out, full=options.full)
    print(summary(result))
    print(f"tables: {out / 'tables'}")
    _report(result, out)


def _report(result, out: Path) -> None:
    """Writes the report, or says what it needs: the tables are there in any case."""
    from opd_jax import analysis

    try:
        with analysis.Bar() as bar:
            path, notes = analysis.write_report(result, out, progress=bar)
    except ImportError as error:
        print(f"no report: {error}")
        return
    print("\n".join([*notes, f"report: {path}"]))


def summary(result) -> str:
    """The paper's Table 1 of the last checkpoints, and what a reader should know."""
    titles = ("norm", 10), ("spectral", 10), ("ratio", 7), ("eff. rank", 10), ("top 1%", 7)
    lines = [f"{'run':16} {'step':>8} " + " ".join(title.rjust(width) for title, width in titles)]
    for run in result.runs:
        last = run.checkpoints[-1]
        mean = last.mean()
        head = f"{run.name[:16]:16} {'-' if last.step is None else last.step:>8} {last.norm:10.4g} "
        if not mean["matrices"]:
            lines.append(head + "no attention or MLP matrix has changed")
            continue
        lines.append(
            head + f"{mean['spectral']:10.4g} {mean['ratio']:7.1%} {mean['effective_rank']:10.1f} "
            f"{mean['top1_ratio']:7.1%}"
        )
        if run.trajectory is not None:
            lines.append(
                f"{run.name}: the leading directions stay within |cos| 0.8 of the final ones from step "
                f"{run.trajectory.lock_in()} of {run.trajectory.steps[-1]} on"
            )
    return "\n".join([*lines, *result.notes])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opd-jax analyze",
        description="What training did to the weights: a report and tables of W - W_base.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base", required=True, help="the checkpoint that training began from")
    add("--run", required=True, action="append", metavar="NAME=CKPT[,CKPT...]", help="may be repeated")
    add("--out", required=True, help="folder for report.html, figures/, tables/ and result.json")
    add("--steps", action="append", default=[], metavar="[NAME=]N[,N...]", help="of a run's checkpoints")
    add("--scores", action="append", default=[], metavar="[NAME=]X[,X...]", help="such as their accuracies")
    add("--k", type=int, default=20, help="leading directions that trajectories follow (20)")
    add("--full", action="store_true", help="write all singular values to result.json, not the leading 32")
    add("--cache", default="", help="folder for results by content, or none (~/.cache/opd_jax/analysis)")
    add("--workers", type=int, help="threads (as many as cores)")
    return parser


def _pair(text: str, option: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or "/" in name:  # a path with = in it
        name, value = Path(text.split(",")[-1]).name, text
    if not name or not all(value.split(",")):
        raise ValueError(f"{option} {text!r} must be NAME=CKPT, or NAME=CKPT,CKPT")
    return name, value


def _named(texts: Sequence[str], runs: dict, option: str) -> list[tuple[str, str]]:
    found = []
    for text in texts:
        name, given, value = text.partition("=")
        if not given:
            if len(runs) > 1:
                raise ValueError(f"{option} {text!r} must say of which run: {option} NAME={text}")
            name, value = next(iter(runs)), text
        if name not in runs:
            raise ValueError(f"{option} names run {name!r}; there are {', '.join(runs)}")
        found.append((name, value))
    return found


def _numbers(text: str, kind: type, option: str) -> list:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be numbers with commas between them") from None
