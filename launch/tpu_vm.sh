#!/usr/bin/env bash
# One run on a Cloud TPU slice that is there: launch/tpu_vm.sh NAME ZONE train FILE ... [key=value ...]
# Starts the same command on every host; jax finds the others by itself. `output=` must be a bucket, or a folder all hosts share.
# INSTALL=WHEEL or INSTALL='rest-jax[tpu,gcs] @ git+https://HOST/REPOSITORY@REF' installs it first, into ~/rest_jax of every host; a
# wheel with the extras EXTRAS (tpu,gcs: gs:// needs the latter).
# A run that an earlier call left behind, when its connection broke, saves and ends first. Exit code: that of the first host in
# order that did not end with 0: the run's, 143 when that host was told to shut down (75 when another was), 1 or 255 when it cannot
# be reached. DRY_RUN=1 prints the commands.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: $0 NAME ZONE train FILE ... [key=value ...]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2

# shellcheck source=launch/run.bash
source "$(dirname "$0")/run.bash"
on_every_host() {
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

if [ -n "${INSTALL:-}" ]; then
  package=$INSTALL
  if [ -f "$INSTALL" ]; then
    run gcloud compute tpus tpu-vm scp "$INSTALL" "$name:" --zone="$zone" --worker=all
    package="./${INSTALL##*/}[${EXTRAS:-tpu,gcs}]"
  fi
  # The images' own Python may be older than 3.11.
  printf -v quoted '%q' "$package"
  on_every_host "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/rest_jax && ~/.local/bin/uv pip install --quiet --reinstall-package rest-jax --python ~/rest_jax/bin/python $quoted"
fi

printf -v words ' %q' "$@" --distributed auto
# rest-jax ends with 75 after a save on SIGTERM; the shell around it makes that 143. A second SIGTERM would end it unsaved.
on_every_host "pkill -F ~/.rest_jax.pid -x rest-jax 2>/dev/null && while pgrep -F ~/.rest_jax.pid -x rest-jax >/dev/null; do sleep 1; done; trap 'kill -TERM \$!; wait \$!; exit 143' TERM; ~/rest_jax/bin/rest-jax$words & echo \$! > ~/.rest_jax.pid; wait \$!"
