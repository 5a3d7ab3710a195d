"""Runs configs/demo.yaml with several seeds and prints the figures of the README.

    python scripts/measure_demo.py            # seeds 0, 1, 2; about a minute each on two cores

A seed changes the order of the prompts, the sampling and the evaluation's draws; base, teacher and the 512
held-out problems stay.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(seed: int, folder: Path) -> dict[str, float]:
    """One run as a user starts it; its accuracies and wall time, start-up and evaluations included."""
    start = time.monotonic()
    subprocess.run(
        [
            *(sys.executable, "-m", "opd_jax.cli", "train", "configs/demo.yaml"),
            *("--seed", str(seed), "--run_dir", str(folder)),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - start
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    record = json.loads(json.loads((newest / "record" / "metadata").read_text())["body"])["record"]
    before, after, teacher = (record[name]["accuracy"] for name in ("before", "after", "teacher"))
    gain = (after - before) / (teacher - before)
    return dict(seed=seed, before=before, after=after, teacher=teacher, gain=gain, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    print("| seed | base | student | teacher | share of the teacher's gain | seconds |")
    print("|---|---|---|---|---|---|")
    rows = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(seed, Path(folder) / "run"))
        row = rows[-1]
        print(
            f"| {seed} | {row['before']:.3f} | {row['after']:.3f} | {row['teacher']:.3f} "
            f"| {row['gain']:.0%} | {row['seconds']:.0f} |",
            flush=True,
        )
    gains = [row["gain"] for row in rows]
    spread = statistics.stdev(gains) if len(gains) > 1 else float("nan")
    print(f"\nshare of the gain: mean {statistics.mean(gains):.0%}, standard deviation {spread:.1%}")


if __name__ == "__main__":
    main()
