#!/bin/sh
#SBATCH --job-name=opsig-track
#SBATCH --array=1-4
#SBATCH --cpus-per-task=1
#SBATCH --output=track-%a.log
# sbatch track-array.sh run.h5: each task measures a share of the checkpoints into a file of its own.
set -eu
export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
opsig track "$1" -o "$1.part$SLURM_ARRAY_TASK_ID.h5" --quiet --format csv
