#!/usr/bin/env bash
# Runs a config on a Cloud TPU slice: asks for the slice, installs this checkout on all its hosts, runs
# `opd-jax train CONFIG --distributed` on each, and does so again after a preemption.
#
#   export PROJECT=... ZONE=us-west4-a NAME=distil TYPE=v5litepod-64 CONFIG=configs/mine.yaml
#   export SHARE=10.0.0.2:/runs                  # an NFS export (Filestore), for run folders and models
#   scripts/launch/cloud_tpu.sh train            # all of it: create, install, run; again if preempted
#   scripts/launch/cloud_tpu.sh fetch results    # the run folder, without its checkpoints, to ./results
#   scripts/launch/cloud_tpu.sh delete
#
# Single steps: create, install, run. --dry-run, first, prints the commands and runs none.
set -euo pipefail

dry=
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi
step=${1:-}
case $step in
train | create | install | run | fetch | delete) ;;
*)
  echo "usage: ${0##*/} [--dry-run] train | create | install | run | fetch FOLDER | delete" >&2
  exit 2
  ;;
esac

PROJECT=${PROJECT:?"set PROJECT to the Google Cloud project"}
ZONE=${ZONE:?"set ZONE to a zone that has the accelerator, such as us-west4-a"}
NAME=${NAME:?"set NAME to what the slice shall be called"}
TYPE=${TYPE:?"set TYPE to the accelerator, such as v5litepod-64"}
SHARE=${SHARE:?"set SHARE to an NFS export that all hosts reach, such as 10.0.0.2:/runs"}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} # the VM's image; v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e
SPOT=${SPOT-1}                          # empty: not preemptible
TRIES=${TRIES:-3}                       # of a run that fails on a healthy slice, before giving up
WAIT=${WAIT:-60}                        # seconds between two looks at the queue
MOUNT=/mnt/opd_jax
RUN_DIR=$MOUNT/$NAME
where=(--project "$PROJECT" --zone "$ZONE")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

do_() { # COMMAND...: runs it, or says what it would run
  if [[ $dry ]]; then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

on_all() { # COMMAND: on every host of the slice at once; fails if one fails
  do_ gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker all --command "$1"
}

state() { # of the request: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ... or nothing
  if [[ $dry ]]; then
    echo ACTIVE
  else
    gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format 'value(state.state)' \
      2>/dev/null || true
  fi
}

request() {
  do_ gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id "$NAME" \
    --accelerator-type "$TYPE" --runtime-version "$RUNTIME" ${SPOT:+--spot}
}

create() {
  local now
  request
  while true; do
    now=$(state)
    case $now in
    ACTIVE) return ;;
    FAILED)
      echo "the request $NAME for a $TYPE failed; gcloud compute tpus queued-resources describe $NAME says why" >&2
      return 1
      ;;
    SUSPEND*) # preempted before it was used
      delete
      request
      ;;
    *) echo "waiting for a $TYPE: ${now:-not yet known}" >&2 ;;
    esac
    sleep "$WAIT"
  done
}

install() { # this checkout, with what is not committed, but without what git ignores
  on_all "sudo apt-get install -y -q nfs-common && sudo mkdir -p $MOUNT && \
(mountpoint -q $MOUNT || sudo mount -t nfs $SHARE $MOUNT) && \
sudo mkdir -p $RUN_DIR && sudo chmod 777 $RUN_DIR && mkdir -p opd_jax"
  local folder
  folder=$(mktemp -d)
  # shellcheck disable=SC2016
  do_ bash -c 'cd "$1" && git ls-files -coz --exclude-standard | tar --null -T - -czf "$2"' - \
    "$root" "$folder/opd_jax.tar.gz"
  do_ gcloud compute tpus tpu-vm scp "$folder/opd_jax.tar.gz" "$NAME:opd_jax.tar.gz" "${where[@]}" --worker all
  rm -rf "$folder"
  # The image's own Python is too old.
  on_all "tar -xzf opd_jax.tar.gz -C opd_jax && cd opd_jax && python3 -m pip install -q --user uv && \
~/.local/bin/uv venv -q --allow-existing --python 3.12 .venv && \
~/.local/bin/uv pip install -q --python .venv/bin/python '.[train,tpu]'"
}

run() {
  CONFIG=${CONFIG:?"set CONFIG to a config of this checkout, such as configs/qwen3_1.7b_from_8b.yaml"}
  # What a lost connection has left behind still holds the chips. By its name, since this shell's own words
  # hold the command, too.
  on_all "cd opd_jax && { pkill -x opd-jax && timeout 120 sh -c 'while pgrep -x opd-jax; do sleep 1; done'; \
pkill -KILL -x opd-jax; .venv/bin/opd-jax train $(printf %q "$CONFIG") --distributed --run_dir $RUN_DIR; }"
}

delete() {
  do_ gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

train() {
  local failures=0
  while true; do
    if [[ $dry || $(state) != ACTIVE ]]; then
      if [[ -z $dry && -n $(state) ]]; then
        delete # preempted: a request is served once
      fi
      create
      install
    fi
    if run; then
      echo "finished; the result is in $RUN_DIR/model on $SHARE" >&2
      return
    fi
    if [[ $(state) == ACTIVE ]]; then
      failures=$((failures + 1))
      if ((failures >= TRIES)); then
        echo "the run failed $failures times on a healthy slice, which still runs and costs: ${0##*/} delete" >&2
        return 1
      fi
    else
      echo "preempted; asking for another slice" >&2
    fi
  done
}

fetch() { # FOLDER
  local folder=${1:?"say where to: ${0##*/} fetch FOLDER"}
  do_ mkdir -p "$folder"
  do_ gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker 0 \
    --command "tar -cf $NAME.tar -C $RUN_DIR --exclude checkpoints --exclude compile_cache ."
  do_ gcloud compute tpus tpu-vm scp "$NAME:$NAME.tar" "$folder/" "${where[@]}" --worker 0
  do_ tar -xf "$folder/$NAME.tar" -C "$folder"
}

"$step" "${@:2}"
