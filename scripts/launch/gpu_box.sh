#!/usr/bin/env bash
# Runs a config on one machine with NVIDIA GPUs: a virtual environment beside this checkout, then
# `opd-jax train`, which takes all the GPUs. One process, so nothing about hosts is said.
#
#   CONFIG=configs/mine.yaml scripts/launch/gpu_box.sh [--dry-run] [--dotted.key VALUE ...]
#
# The same command again goes on with a run that was stopped.
set -euo pipefail

dry=
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi
CONFIG=${CONFIG:?"set CONFIG to a config, such as configs/qwen3_1.7b_from_8b.yaml"}
PYTHON=${PYTHON:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

do_() { # COMMAND...: runs it, or says what it would run
  if [[ $dry ]]; then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

do_ nvidia-smi --query-gpu name,memory.total,driver_version --format csv
if [[ ! -x .venv/bin/opd-jax ]]; then
  do_ "$PYTHON" -m venv .venv
  do_ .venv/bin/pip install -q -e '.[train,cuda]' # brings CUDA's libraries; the driver must be there
fi
# Says so at once if JAX sees no GPU, instead of training on the CPU.
do_ .venv/bin/python -c 'import jax; assert jax.default_backend() == "gpu", jax.devices()'
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92} # JAX takes 0.75 by itself
do_ exec .venv/bin/opd-jax train "$CONFIG" "$@"
