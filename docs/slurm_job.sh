#!/bin/bash
# A training job on Slurm, without submitit; what follows the file's name goes to train.py:
#
#   sbatch docs/slurm_job.sh stage=finetune model=7b trainer=multinode
#
# Nodes and tasks have to be the trainer's num_nodes and devices: one task per device, each of which
# sees all devices of its node. Options before the file's name win over those here, e.g. --nodes=4.
#SBATCH --job-name=vipllava
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
# Slurm itself queues the job again when a node dies or others come first.
#SBATCH --requeue
# Two minutes before the time is up the tasks get the signal, save and end with 75. With `B:` only
# this shell would get it.
#SBATCH --signal=USR1@120

# What srun no longer takes from sbatch by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

# --wait: when a task has ended, the others have so many seconds; so one that is lost ends the job.
# PYTHON may be a whole command: PYTHON="apptainer exec --nv vip.sif python" sbatch ...
# shellcheck disable=SC2086
srun --wait=300 ${PYTHON:-python} train.py "$@"
code=$?

# 75: saved, and not done. 138: killed by the signal before training had begun.
if [ "$code" -eq 75 ] || [ "$code" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
