#!/usr/bin/env bash
# A sweep with many workers: sbatch [--array=0-15] launch/sweep_slurm.sh FILES... --space SPACE --storage URL [key=value ...]
# A task is a worker with GPUs of its own. All tasks need one database (--storage, PostgreSQL) and a shared `output=`. A worker
# that is pre-empted saves, its trial is free at once, and SLURM queues the task again. After a time limit submit again: the
# sweep continues.
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
exec srun rest-jax sweep "$@"
