#!/usr/bin/env bash
# One run on TPUs that may be taken away: INSTALL=... launch/tpu_queued.sh NAME ZONE TYPE train FILE ... [key=value ...]
# Requests the queued resource NAME of TYPE (v5litepod-16, v5p-32, v6e-16, ...), waits until it is active, installs rest-jax, runs the
# command on every host (tpu_vm.sh), and after a preemption requests it again and runs the same command, which resumes from its
# checkpoints: `output=` must be a bucket. Ends when the run has finished (0) or refuses its input (2); other failures on slices
# that are there are tried again RETRIES (3) times. Then it deletes the resource, unless KEEP=1.
# SLICES (1), TIER (spot, reserved, on-demand), RUNTIME (the image, by TYPE), POLL (30 s between looks). DRY_RUN=1 prints the commands.
set -euo pipefail
if [ $# -lt 4 ] || [ -z "${INSTALL:-}" ]; then
  echo "usage: INSTALL=WHEEL|REQUIREMENT $0 NAME ZONE TYPE train FILE ... [key=value ...]" >&2
  exit 2
fi
name=$1 zone=$2 type=$3
shift 3
words=("$@")
here=$(dirname "$0")
slices=${SLICES:-1} poll=${POLL:-30} left=${RETRIES:-3}

case $type in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime=tpu-ubuntu2204-base ;;
esac
request=(gcloud compute tpus queued-resources create "$name" --zone="$zone" --accelerator-type="$type" --runtime-version="${RUNTIME:-$runtime}")
case ${TIER:-spot} in
  spot | reserved) request+=("--${TIER:-spot}") ;;
  on-demand) ;;
  *) echo "$0: TIER=$TIER: none of spot, reserved, on-demand" >&2; exit 2 ;;
esac
if [ "$slices" = 1 ]; then
  nodes=("$name")
  request+=(--node-id="$name")
else
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
  request+=(--node-count="$slices" --node-prefix="$name")
fi
release=(gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet)

# shellcheck source=launch/run.bash
source "$here/run.bash"

if [ -n "${DRY_RUN:-}" ]; then
  run "${request[@]}"
  for node in "${nodes[@]}"; do "$here/tpu_vm.sh" "$node" "$zone" "${words[@]}"; done
  [ -n "${KEEP:-}" ] || run "${release[@]}"
  exit
fi

fault=$(mktemp) released=''
trap '
  rm -f "$fault"
  [ -n "$released" ] || echo "$name may still be there; to end it: ${release[*]}" >&2
' EXIT

# ACTIVE when every node is ready too; SUSPENDED as soon as one is lost, which the resource itself says later; ABSENT only when
# gcloud says so: UNKNOWN, and a return code of 1, when it fails otherwise, as without a network.
state() {
  local found node failed=0
  if ! found=$(gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' 2>"$fault"); then
    found=ABSENT
    grep -q NOT_FOUND "$fault" || { found=UNKNOWN failed=1; cat "$fault" >&2; }
  fi
  [ "$found" = ACTIVE ] || { echo "$found"; return "$failed"; }
  for node in "${nodes[@]}"; do
    case $(gcloud compute tpus tpu-vm describe "$node" --zone="$zone" --format='value(state)' 2>/dev/null) in
      READY) ;;
      PREEMPTED | TERMINATED) found=SUSPENDED ;;
      *) [ "$found" = SUSPENDED ] || found=UNKNOWN ;;
    esac
  done
  echo "$found"
}

use_up_a_try() {
  [ "$left" != 0 ] || exit "$1"
  left=$((left - 1))
}

# An outage is waited out; what has not answered once has no login, no network or no gcloud.
answered=''
acquire() {
  local now
  while now=$(state) || [ -n "$answered" ] || { released=1; exit 1; }; [ "$now" != ACTIVE ]; do
    answered=1
    echo "$name: $now" >&2
    case $now in
      ABSENT) run "${request[@]}" || use_up_a_try $? ;;
      SUSPENDED | FAILED) run "${release[@]}" || use_up_a_try $? ;;
    esac
    sleep "$poll"
  done
  answered=1
}

# The command on all slices at once; 2 if one refuses its input, else the highest of their exit codes. Each has a process group, so
# that a signal can end it.
processes=''
run_slices() {
  local node process result code=0
  processes=''
  set -m
  for node in "${nodes[@]}"; do
    "$here/tpu_vm.sh" "$node" "$zone" "${words[@]}" < /dev/null &
    processes+=" $!"
  done
  set +m
  for process in $processes; do
    result=0
    wait "$process" || result=$?
    [ "$code" = 2 ] || { [ "$result" != 2 ] && [ "$result" -le "$code" ]; } || code=$result
  done
  return "$code"
}

trap '
  for process in $processes; do kill -TERM -- "-$process" 2>/dev/null || true; done
  exit 130
' INT TERM
while :; do
  acquire
  code=0
  run_slices || code=$?
  [ "$code" != 0 ] || break
  sleep "$poll"
  # Lost slices and hosts that were told to stop (143), themselves or with another (75), are no failures of the run.
  if [ "$(state)" = ACTIVE ] && [ "$code" != 143 ] && [ "$code" != 75 ]; then
    if [ "$code" = 2 ] || [ "$left" = 0 ]; then break; fi
    left=$((left - 1))
  fi
  echo "$name: exit code $code; the same command again" >&2
done
if [ -z "${KEEP:-}" ]; then
  run "${release[@]}"
  released=1
fi
exit "$code"
