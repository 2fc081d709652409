#!/usr/bin/env bash
# One run on a Cloud TPU slice: launch/tpu_pod.sh TPU-NAME ZONE FILE ... [key=value ...]
# Starts the same command on every host of the slice; jax finds the others by itself. `output=` must be a path all hosts share.
set -euo pipefail
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "cd rest_jax && .venv/bin/rest-jax train $* --distributed"
