#!/usr/bin/env bash
# One run on GPU nodes: sbatch [--nodes=4] launch/slurm.sh train FILE ... [key=value ...]
# One process a GPU; jax finds the others in SLURM's variables. `output=` must be a folder all nodes share, or a bucket.
# Near the time limit, or when it is preempted, the run saves; the job is then queued again and resumes. It is not queued again when
# it has finished, failed (2: input that cannot be used) or was cancelled. DRY_RUN=1 prints the command.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: sbatch $0 train FILE ... [key=value ...]" >&2
  exit 2
fi
case $1 in
  sweep | compare) ;;
  *) set -- "$@" --distributed auto ;;
esac
# SLURM signals the tasks. rest-jax ends with 75 after a save on SIGTERM; the shell around it makes that 143.
# shellcheck disable=SC2016 # the tasks' shells expand it
task='trap "kill -TERM \$!; wait \$!; exit 143" TERM; "$0" "$@" & wait $!'
command=(srun bash -c "$task" rest-jax "$@")
if [ -n "${DRY_RUN:-}" ]; then
  (PS4=''; set -x; : "${command[@]}") 2>&1 | sed '1s/^: //'
  exit
fi

"${command[@]}" &
step=$! code=0
trap 'kill -TERM "$step" 2>/dev/null || true' TERM
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
wait "$step" || code=$?
# A job that scancel has ended is not RUNNING any more.
if [ "$code" = 143 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
