#!/usr/bin/env bash
# One run in N processes on this machine: launch/local.sh N train FILE ... [key=value ...]
# Process i gets the i-th GPU of CUDA_VISIBLE_DEVICES (default: GPU i); on CPUs that changes nothing. When one fails, all end, with
# its exit code. SIGTERM and Ctrl-C are passed on. The first listens on PORT (8476). DRY_RUN=1 prints the commands.
set -euo pipefail
if [ $# -lt 2 ] || ! [[ $1 =~ ^0*[1-9][0-9]*$ ]]; then
  echo "usage: $0 PROCESSES train FILE ... [key=value ...]" >&2
  exit 2
fi
count=$((10#$1)) port=${PORT:-8476}
shift
IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((count - 1)))}"
if [ "${#gpus[@]}" -lt "$count" ]; then
  echo "$0: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES has fewer than $count GPUs; name one for each process, or start fewer" >&2
  exit 2
fi

processes=()
for i in $(seq 0 $((count - 1))); do
  command=(env "CUDA_VISIBLE_DEVICES=${gpus[i]}" rest-jax "$@" --distributed "$i/$count@127.0.0.1:$port")
  if [ -n "${DRY_RUN:-}" ]; then
    (PS4=''; set -x; : "${command[@]}") 2>&1 | sed '1s/^: //'
  else
    "${command[@]}" &
    processes+=($!)
  fi
done

# Processes that are gone no longer mind.
pass_on() { kill "-$1" "${processes[@]}" 2>/dev/null || true; }
stopped='' code=0
trap 'stopped=1; pass_on TERM' TERM INT
running=${#processes[@]}
while [ "$running" -gt 0 ] && [ "$code" = 0 ]; do
  stopped='' result=0
  wait -n || result=$?
  # A signal ends the wait, no process.
  [ -z "$stopped" ] || continue
  running=$((running - 1)) code=$result
done
if [ "$code" != 0 ]; then
  pass_on TERM
  for _ in $(seq "${GRACE:-10}"); do kill -0 "${processes[@]}" 2>/dev/null || break; sleep 1; done
  pass_on KILL
fi
exit "$code"
