#!/usr/bin/env bash
# A sweep with many workers: sbatch [--array=0-15] launch/sweep_slurm.sh FILES... --space SPACE --storage URL [key=value ...]
# A task of the array is a worker with GPUs of its own. All need one database (--storage, PostgreSQL) and a shared `output=`. A worker
# that is preempted or runs into its time limit saves, its trial is free at once, and its task is queued again (slurm.sh).
# Submit it from the root of the repository: SLURM runs a copy of this file elsewhere.
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail
exec "${SLURM_SUBMIT_DIR:-.}/launch/slurm.sh" sweep "$@"
