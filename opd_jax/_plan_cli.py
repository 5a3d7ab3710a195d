"""opd-jax plan."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from opd_jax._extras import require

_EPILOG = """
Any key of the config can be given as --dotted.key VALUE, as with `opd-jax train`. A model may be a
folder with nothing but a config.json: no weights and no data are read.

  opd-jax plan configs/qwen3_1.7b_from_8b.yaml --topology v5e:8x8 \\
      --student.path configs/models/qwen3_1.7b --teacher.path configs/models/qwen3_8b
"""
_LEGEND = """\
Per device and step. peak: the program's arguments, temporaries and outputs, and the run's other arrays that
lie in memory meanwhile. FLOPs: of matrix products in the compiled program, recomputation included; useful:
those that the mathematics needs, divided evenly. moved: bytes to and from memory, by the compiled program's
text. Loops count as often as they run; decode is all of max_new_tokens, as if no completion ended early.
at least: the largest of the times for compute, memory and links at the chip's published figures; a real run
takes longer."""
_BY_HAND = """\
Nothing was compiled: there is no compiler for this chip here. Programs were lowered for it (attention by XLA,
as cuDNN cannot be asked for without a GPU); memory is added up by hand, for a kernel of attention that holds
no scores, and the least time is that of the products alone."""


def plan(argv: Sequence[str]) -> None:
    """The command `opd-jax plan`.

    Raises:
        ValueError: on arguments, or a config, that make no sense.
        ImportError: if libtpu is missing.
    """
    options, overrides = _parser().parse_known_args(list(argv))
    if bool(options.topology) == bool(options.devices):
        raise ValueError("say for what: --topology v5e:4x4, or --devices N of what is here")
    from opd_jax import config, parallel, training

    settings = config.load(options.config, overrides)
    if options.topology:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        devices = parallel.topology(options.topology)
    else:
        devices = _here(options.devices)
    keywords = dict(prompt_tokens=options.prompt_tokens, progress=_say)
    if options.search:
        plans = training.search_plans(settings, devices, **keywords)
    else:
        plans = [training.plan(settings, devices, **keywords)]
    if options.json:
        print(
            json.dumps([_record(each) for each in plans] if options.search else _record(plans[0]), indent=1)
        )
        return
    console = _console()
    if options.search:
        _ranking(console, plans)
    _table(console, plans[0])


def _here(count: int) -> Sequence[Any]:
    """`count` of the devices that are here; on a CPU, as many virtual ones."""
    import jax

    with contextlib.suppress(RuntimeError):  # too late: the backend has started
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        raise ValueError(
            f"--devices is {count}, but there are {len(devices)} {devices[0].device_kind} devices"
        )
    return devices[:count]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opd-jax plan",
        description="Compiles the programs of a config and says what they need of each device; runs nothing.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG", help="YAML, as for train")
    add(
        "--topology",
        help="a TPU slice that need not be there: v5e:4x4, v5p:4x4x4 (needs libtpu); or h100:8, by hand",
    )
    add("--devices", type=int, help="so many of the devices that are here")
    add("--prompt-tokens", type=int, help="of the longest prompt (data.max_prompt_length)")
    add("--search", action="store_true", help="try splits of the mesh and micro-batches; the best first")
    add("--json", action="store_true", help="print JSON")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _record(one: Any) -> dict[str, Any]:
    record = dataclasses.asdict(one) | dict(fits=one.fits, bound=one.bound)
    for program in record["programs"]:
        if program["needs"] is not None and program["needs"] != program["needs"]:
            program["needs"] = None  # XLA did not say; JSON has no nan
    return record


def _console() -> Any:
    require("rich")
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 132, highlight=False)


def _ranking(console: Any, plans: Sequence[Any]) -> None:
    from rich.table import Table

    table = Table(title="fits first, then the least bound")
    for title in ("fsdp", "tensor", "micro_batches", "fits", "largest peak GiB", "step at least"):
        table.add_column(title, justify="right")
    for each in plans:
        peaks = [program.peak for program in each.programs if program.peak is not None]
        table.add_row(
            str(each.mesh["fsdp"]), str(each.mesh["tensor"]), str(each.micro_batches), _fits(each.fits),
            _gib(max(peaks, default=None)), _seconds(each.bound),
        )  # fmt: skip
    console.print(table)


def _table(console: Any, one: Any) -> None:
    from rich.table import Table

    mesh = " x ".join(f"{name} {size}" for name, size in one.mesh.items())
    table = Table(
        title=f"{one.devices} x {one.kind}, mesh {mesh}; {one.batch_size} rows a step in {one.micro_batches} "
        f"micro-batches, prompts of {one.prompt_width} tokens"
    )
    titles = ("program", "arguments", "temp.", "peak", "of GiB", "fits", "TFLOPs", "useful", "moved GB")
    for title in (*titles, "FLOPs/B", "sent GB", "at least", "by"):
        table.add_column(title, justify="left" if title in ("program", "by") else "right")
    for each in one.programs:
        refused = each.peak is None
        numbers = [_gib(each.arguments), _gib(each.temporaries), _gib(each.peak)]
        if refused:
            numbers = ["", "", "not compiled" if each.needs is None else f"> {_gib(each.needs)}"]
        limit = "" if each.limit is None else _gib(each.limit)
        row = [each.name, *numbers, limit, _fits(each.fits)]
        if not refused:
            sent = sum(size for _, size in each.collectives.values())
            counted = [_number(each.bytes / 1e9), _number(each.intensity), _number(sent / 1e9)]
            row += [_number(each.flops / 1e12), _number(each.useful / 1e12)]
            row += ["?"] * 3 if each.by_hand else counted
            row += [_seconds(each.bound), each.bottleneck]
        table.add_row(*row)
    console.print(table)
    for each in one.programs:
        if each.collectives:
            parts = (
                f"{k} {n:g} times, {_number(b / 1e9)} GB" for k, (n, b) in sorted(each.collectives.items())
            )
            console.print(f"{each.name} sends: {'; '.join(parts)}")
        if each.unknown:
            console.print(f"{each.name}: FLOPs of {', '.join(each.unknown)} are not counted")
    for each in one.programs:
        if each.advice:
            console.print(f"{each.name}: {each.advice}")
    if one.bound is not None:
        console.print(f"a step takes at least {_seconds(one.bound)}")
    if one.chip is None:
        console.print(f"no published figures of {one.kind} are known here: no limit of memory, no least time")
    else:
        console.print(f"figures of the chip: {one.chip.source}")
    console.print(_LEGEND, soft_wrap=True)
    if any(each.by_hand for each in one.programs):
        console.print(_BY_HAND, soft_wrap=True)


def _fits(value: bool | None) -> str:
    return {None: "?", True: "yes", False: "NO"}[value]


def _gib(size: float | None) -> str:
    return "?" if size is None or size != size else f"{size / 2**30:.2f}"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{_number(value)} s" if value >= 0.1 else f"{_number(1e3 * value)} ms"
