#!/bin/sh
#SBATCH --job-name=opsig-merge
#SBATCH --output=merge.log
# sbatch --dependency=afterany:JOB merge.sh run.h5: takes in what is there, and says what is missing.
set -eu
opsig merge "$1" "$1".part*.h5
