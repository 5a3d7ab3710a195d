"""scripts/measure_scaling.py on a model small enough to compile in passing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.tpu
@pytest.mark.slow
def test_a_device_sends_no_more_on_a_larger_slice(tmp_path):
    """In its own process: libtpu reads the environment when it is loaded."""
    pytest.importorskip("libtpu")
    sizes = json.loads((ROOT / "configs" / "models" / "qwen3_1.7b" / "config.json").read_text())
    sizes |= dict(vocab_size=2048, hidden_size=1024, num_hidden_layers=2, intermediate_size=1024)
    sizes |= dict(num_attention_heads=8, num_key_value_heads=4)
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(sizes))
    config = dict(student={"path": str(tmp_path / "student"), "dtype": "bfloat16"})
    config |= dict(teacher={"path": str(tmp_path / "teacher"), "dtype": "bfloat16"})
    config |= dict(data={"source": "arithmetic", "max_prompt_length": 128}, max_new_tokens=384)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "scripts" / "measure_scaling.py"), str(tmp_path / "run.yaml")]
    command += ["--chips", "v5e:2x4,v5e:4x4", "--fsdp", "8", "--chunk", "128", "--programs", "score"]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        command, env=os.environ | dict(PYTHONPATH=path), capture_output=True, text=True, timeout=580
    )
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    rows = {line[1]: line for line in lines if line[0] == "score"}
    assert rows.keys() == {"8", "16"}, done.stderr
    few, many = rows["8"], rows["16"]
    assert (few[2], many[2]) == ("1 x 8", "2 x 8")
    assert few[3] == many[3]  # FLOPs
    assert float(many[5]) <= 1.1 * float(few[5]) + 0.05, done.stdout
