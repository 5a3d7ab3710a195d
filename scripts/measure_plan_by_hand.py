"""How far memory added up by hand, as `opd-jax plan` does for GPUs, is from what XLA says, on TPU slices.

    python scripts/measure_plan_by_hand.py

compiles the plans of the README (minutes each; needs libtpu) and prints both peaks of each program.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

from opd_jax import config, parallel, training
from opd_jax.parallel import compiling_for, make_mesh
from opd_jax.training._plan import _begin
from opd_jax.training._plan_by_hand import need
from opd_jax.training._plan_programs import programs, shapes

ROOT = Path(__file__).resolve().parents[1]
PLANS = (
    ("qwen3_1.7b_from_8b", "v5e:8x8", "qwen3_1.7b", "qwen3_8b"),
    ("qwen3_8b_from_32b", "v5p:2x4x4", "qwen3_8b", "qwen3_32b"),
)


def main() -> None:
    print("| config | slice | program | by hand, GiB | XLA, GiB | ratio |")
    print("|---|---|---|---|---|---|")
    for name, topology, student, teacher in PLANS:
        models = dict(student=student, teacher=teacher)
        words = [f"--{who}.path={ROOT}/configs/models/{sizes}" for who, sizes in models.items()]
        settings = config.load(ROOT / f"configs/{name}.yaml", words)
        devices = parallel.topology(topology)
        compiled = training.plan(settings, devices)
        with compiling_for("tpu"):
            run = shapes(settings, make_mesh(**vars(settings.mesh), devices=devices))
            peaks = [_begin(program, run).others + sum(need(program, run)[:3]) for program in programs(run)]
        for one, peak in zip(compiled.programs, peaks, strict=True):
            ours, xlas = peak / 2**30, one.peak / 2**30
            print(f"| {name} | {topology} | {one.name} | {ours:.1f} | {xlas:.1f} | {ours / xlas:.2f} |")


if __name__ == "__main__":
    main()
