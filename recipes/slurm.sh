#!/usr/bin/env bash
# A run on Slurm: a Ray cluster in the allocation, a node each, then the same command as anywhere.
#
#   sbatch --nodes=2 --gpus-per-node=8 recipes/slurm.sh CONFIG num_devices=16 storage_path=/shared/runs
#
# Submit it from the repository, which must lie on a disk that all nodes share, with its .venv; so must $HOME.
# Requeued after a failure or a preemption, the run continues from its last complete state.
#SBATCH --job-name=forgebook
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"

# Two jobs on one node must not meet: ports and folders by the job's number.
port=$((20000 + SLURM_JOB_ID % 10000))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

# Whoever reaches a Ray port can run code: the nodes of this job share a token that nobody else can read.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray-token-$SLURM_JOB_ID"
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")
trap 'rm -rf "$RAY_AUTH_TOKEN_PATH" "/tmp/ray-$SLURM_JOB_ID"' EXIT

cpus=${SLURM_CPUS_ON_NODE:-$(nproc)}
ray=(ray start --block --num-cpus="$cpus" --disable-usage-stats)
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || ray+=(--num-gpus="$SLURM_GPUS_ON_NODE")
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  "${ray[@]}" --head --temp-dir="/tmp/ray-$SLURM_JOB_ID" --node-ip-address="$address" --port="$port" --include-dashboard=false &
others=$((${#nodes[@]} - 1))
if [ "$others" -gt 0 ]; then
  srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" "${ray[@]}" --address="$address:$port" &
fi

# The command runs on the first node, once every node has joined.
export RAY_ADDRESS="$address:$port"
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" python - "${#nodes[@]}" <<'WAIT'
import sys, time, ray
for _ in range(150):
    try:
        ray.init(logging_level="ERROR", log_to_driver=False)
        break
    except ConnectionError:
        time.sleep(2)
for _ in range(150):
    if sum(node["Alive"] for node in ray.nodes()) >= int(sys.argv[1]):
        sys.exit()
    time.sleep(2)
sys.exit("not every node joined the Ray cluster within 5 minutes")
WAIT
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" python main.py "$@"
