#!/usr/bin/env bash
# Starts N processes of w2s_jax.main on this machine, which train as one program:
#   launch/local.sh N --config=configs/llama_badnet.py [any flag of w2s_jax.main]
# With NVIDIA GPUs each process takes one GPU. On CPUs JAX_NUM_CPU_DEVICES sets the number of devices per process.
# Nothing here needs editing. PORT=... chooses the coordinator's port, PYTHON=... the interpreter. The exit code is that
# of the failed process with the lowest number.
set -euo pipefail
n=${1:-}
if ! [[ $n =~ ^[1-9][0-9]*$ ]]; then echo "usage: launch/local.sh N --config=... [flags], N processes" >&2; exit 2; fi
shift
port=${PORT:-$((20000 + RANDOM % 20000))}
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < n; i++)); do
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then export CUDA_VISIBLE_DEVICES=$i; fi
  "${PYTHON:-python}" -m w2s_jax.main --coordinator_address="localhost:$port" --num_processes="$n" --process_id="$i" \
    "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || { rc=$?; [ "$code" -ne 0 ] || code=$rc; }
done
wait    # after a signal the waits above return while the processes are still saving
exit "$code"
