"""Plain distillation against EffOPD on the demo's task: steps and tokens to a target accuracy, cost included.

    python scripts/measure_foresight.py                     # 3 seeds; about a quarter of an hour on two cores
    python scripts/measure_foresight.py --seeds 5

Each run is `opd-jax train configs/demo.yaml` with other options, from one base to one teacher; seeds vary
prompts, sampling and evaluation. The target is 95% of the accuracy that plain distillation at the lowest
learning rate ends with. Tokens are those sampled from the student in training and in searches, and those
that a search scores, but not the one sampling of the rollouts that a KL is measured on. Plain distillation
at higher rates stands beside, as the honest alternative.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from opd_jax import config as configs
from opd_jax import training

ROOT = Path(__file__).parents[1]
SEARCH = dict(schedule="powers_of_two", prompts=50)
VARIANTS = {
    "plain": {},
    "EffOPD, KL": SEARCH | dict(score="kl", rule="reference"),
    "EffOPD, accuracy (paper)": SEARCH | dict(score="accuracy", rule="paper"),
}


def run(variant: str, seed: int, rate: float, steps: int, folder: Path) -> dict[str, list]:
    """Accuracy, tokens and seconds at each evaluation of one run."""
    base = configs.load(ROOT / "configs" / "demo.yaml")
    data = replace(base.data, options=base.data.options | {"seed": 1000 + seed})
    search = configs.ExtrapolateConfig(**VARIANTS[variant])
    settings = replace(
        base,
        steps=steps,
        seed=seed,
        run_dir=str(folder / f"{variant}-{rate}-{seed}".replace(" ", "")),
        student=replace(base.student, path=str(ROOT / base.student.path)),
        teacher=replace(base.teacher, path=str(ROOT / base.teacher.path)),
        data=data,
        optimizer=replace(base.optimizer, learning_rate=rate),
        evaluation=replace(base.evaluation, every=8, teacher=False),
        foresight=configs.ForesightConfig(extrapolate=search),
    )
    result = training.train(settings)
    lines = (Path(settings.run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    tokens, seconds, searched, found = 0, 0.0, 0, dict(step=[], accuracy=[], tokens=[], seconds=[])
    for line in map(json.loads, lines):
        tokens += line.get("tokens", 0) + line.get("extrapolate_tokens", 0)
        searched += line.get("extrapolate_tokens", 0)
        seconds += line.get("step_seconds", 0) + line.get("extrapolate_seconds", 0)
        if "accuracy" in line:
            for name, value in dict(
                step=line["step"], accuracy=line["accuracy"], tokens=tokens, seconds=seconds
            ).items():
                found[name].append(value)
    share = 0.0 if result.searches is None else result.searches[1] / result.seconds
    return found | dict(searched=searched, share=share)


def crossing(found: dict[str, list], what: str, target: float) -> float | None:
    """Where the accuracy first reaches the target, interpolated between two evaluations."""
    for i, accuracy in enumerate(found["accuracy"]):
        if accuracy >= target:
            if i == 0:
                return float(found[what][0])
            (a, b), (x, y) = found["accuracy"][i - 1 : i + 1], found[what][i - 1 : i + 1]
            return x + (y - x) * (target - a) / (b - a)
    return None


def spread(values: list[float | None]) -> str:
    reached = [v for v in values if v is not None]
    if len(reached) < len(values):
        return f"reached by {len(reached)} of {len(values)}"
    deviation = f" +- {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-5, help="learning rate of all variants")
    parser.add_argument("--plain-rates", type=float, nargs="*", default=[1e-4, 3e-4], help="of plain alone")
    given = parser.parse_args()
    wanted = [(given.rate, variant) for variant in VARIANTS]
    wanted += [(rate, "plain") for rate in given.plain_rates]
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            pair: [run(pair[1], seed, pair[0], given.steps, Path(folder)) for seed in range(given.seeds)]
            for pair in wanted
        }
    plain = runs[given.rate, "plain"]
    targets = [0.95 * found["accuracy"][-1] for found in plain]
    print(f"\ntarget accuracy by seed: {', '.join(f'{t:.3f}' for t in targets)}")
    print("| learning rate | run | final accuracy | steps to target | tokens to target | search's time |")
    print("|---|---|---|---|---|---|")
    for (rate, variant), found in runs.items():
        steps, tokens = (
            spread([crossing(f, what, t) for f, t in zip(found, targets, strict=True)])
            for what in ("step", "tokens")
        )
        share = statistics.mean(f["share"] for f in found)
        final = spread([f["accuracy"][-1] for f in found])
        print(f"| {rate:g} | {variant} | {final} | {steps} | {tokens} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
