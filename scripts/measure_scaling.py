"""Weak scaling on paper: what a device does, moves and sends as the slice grows and its rows stay the same.

    python scripts/measure_scaling.py                      # Qwen3-1.7B <- 8B for 8, 16, 64, 256 chips of v5e
    python scripts/measure_scaling.py --fsdp 256           # weights spread over all chips
    python scripts/measure_scaling.py --programs update --chips v5e:4x4,v5e:16x16 --student.remat none

Compiles the scoring and the update that `opd-jax train CONFIG` would run, for chips that need not be there
(libtpu must be: pip install 'opd_jax[tpu]'). Weights are spread over `--fsdp` chips at most; a larger slice
holds them several times (mesh.data). Words that are not options here are keys of the config, as for
`opd-jax plan`. Exit status 1 if what a device sends grows by more than 10% from 16 chips (or, without them,
from the smallest slice) to the largest slice.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from opd_jax import config, parallel, training

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ROOT / "configs" / "qwen3_1.7b_from_8b.yaml"
MODELS = ROOT / "configs" / "models"
CHIPS = "v5e:2x4,v5e:4x4,v5e:8x8,v5e:16x16"
MOST = 1.10
STEP = ("prefill", "decode", "score", "update")


def measure(
    settings: config.Config, slices: Iterable[str], programs: Iterable[str], fsdp: int | None = None
) -> list[training.Plan]:
    """A plan for each slice, of `programs` alone; `settings.batch_size` is a device's."""
    found = []
    for name in slices:
        devices = parallel.topology(name)
        count = len(devices)
        grown = dataclasses.replace(
            settings,
            batch_size=settings.batch_size * count,
            mesh=config.MeshConfig(data=-1, fsdp=min(count, fsdp or count), tensor=1),
        )
        skipped = {each: training.ProgramPlan(each) for each in STEP if each not in programs}
        found.append(training.plan(grown, devices, progress=_say, keep=skipped))
        found[-1].programs = [each for each in found[-1].programs if each.name in programs]
    return found


def growth(plans: list[training.Plan]) -> float:
    """Bytes that a device sends, all programs together: those on the largest slice over those on 16 chips.

    Above 1 even where nothing is wrong: of weights that are spread over n chips a chip gathers (n - 1) / n.
    """
    return sent(max(plans, key=lambda plan: plan.devices)) / sent(_base(plans))


def _base(plans: list[training.Plan]) -> training.Plan:
    ordered = sorted(plans, key=lambda plan: plan.devices)
    return next((plan for plan in ordered if plan.devices == 16), ordered[0])


def sent(plan: training.Plan) -> float:
    """Bytes that leave a device."""
    return sum(size for each in plan.programs for _, size in each.collectives.values())


def table(plans: list[training.Plan]) -> str:
    """Markdown: a line for each program and slice, figures per device and step."""
    heads = ["program", "chips", "data x fsdp", "TFLOPs", "moved, GB", "sent, GB", "of it", "peak, GiB"]
    lines = [heads, ["---"] * len(heads)]
    for name in [each.name for each in plans[0].programs]:
        for plan in plans:
            one = next(each for each in plan.programs if each.name == name)
            kinds = sorted((kind, size / 1e9) for kind, (_, size) in one.collectives.items())
            lines.append(
                [
                    name,
                    str(plan.devices),
                    f"{plan.mesh['data']} x {plan.mesh['fsdp']}",
                    f"{one.flops / 1e12:.1f}",
                    f"{one.bytes / 1e9:.0f}",
                    f"{sum(size for _, size in kinds):.1f}",
                    ", ".join(f"{kind} {size:.1f}" for kind, size in kinds if size >= 0.05),
                    "does not fit" if one.peak is None else f"{one.peak / 2**30:.1f}",
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _settings(options: argparse.Namespace, overrides: list[str]) -> config.Config:
    words = [f"--batch_size={options.rows}", f"--micro_batches={options.micro_batches}"]
    words += [f"--loss_chunk={options.chunk}"]
    if Path(options.config).resolve() == DEFAULT:
        words += [f"--student.path={MODELS / 'qwen3_1.7b'}", f"--teacher.path={MODELS / 'qwen3_8b'}"]
    words = [part for word in words for part in word.split("=", 1)]
    return config.load(options.config, [*words, *overrides])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", default=str(DEFAULT))
    parser.add_argument("--chips", default=CHIPS, help="slices, default %(default)s")
    parser.add_argument("--programs", default="score,update", help="default %(default)s")
    parser.add_argument("--fsdp", type=int, default=16, help="at most, default %(default)s")
    parser.add_argument("--rows", type=int, default=2, help="of a device, default %(default)s")
    parser.add_argument("--micro-batches", type=int, default=2, help="default %(default)s")
    parser.add_argument("--chunk", type=int, default=1024, help="loss_chunk of a device, default %(default)s")
    options, overrides = parser.parse_known_args()
    slices, programs = options.chips.split(","), options.programs.split(",")
    plans = measure(_settings(options, overrides), slices, programs, options.fsdp)
    print(table(plans))
    grown, least = growth(plans), _base(plans).devices
    print(f"\nfrom {least} chips to {max(p.devices for p in plans)}, what a device sends: {grown - 1:+.1%}")
    return int(grown > MOST)


if __name__ == "__main__":
    raise SystemExit(main())
