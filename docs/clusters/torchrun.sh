#!/bin/sh
#SBATCH --job-name=opsig
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --output=torchrun.log
# sbatch --nodes=2 torchrun.sh sharpness run.h5: one process a core (or, with --gpus-per-node, a GPU) on every node.
set -eu
export OMP_NUM_THREADS=1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun python -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-$SLURM_CPUS_PER_TASK}" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:29511" --rdzv-id="$SLURM_JOB_ID" -m opsig_cli "$@"
