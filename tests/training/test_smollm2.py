"""Three whole steps of configs/smollm2.yaml on the real model, within 8 GiB."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.network
@pytest.mark.timeout(1800)
def test_three_steps_stay_within_eight_gibibytes(smollm2, tmp_path):
    command = [sys.executable, "-m", "opd_jax.cli", "train", str(ROOT / "configs" / "smollm2.yaml")]
    for key, value in {
        "steps": 3,
        "run_dir": tmp_path / "run",
        "student.path": smollm2,
        "teacher.path": smollm2,
        "evaluation.prompts": 0,
        "evaluation.options": "{}",
    }.items():
        command += [f"--{key}", str(value)]
    subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=1500)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest child so far
    assert peak < 8 * 2**30
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["finite"] and line["sampler_difference"] < 1e-4 for line in lines)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
