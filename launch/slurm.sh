#!/usr/bin/env bash
# One run on several GPU nodes: sbatch launch/slurm.sh FILE ... [key=value ...]
# One process a GPU; jax finds coordinator, process count and id in SLURM's variables. The run folder must be on a shared file system.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
set -euo pipefail
srun --kill-on-bad-exit=1 rest-jax train "$@" --distributed
