#!/usr/bin/env bash
# A TPU pod slice by gcloud: every worker runs the same command, JAX finds the others.
#   launch/tpu_pod.sh create                       asks for the slice (a queued resource) and waits for it
#   launch/tpu_pod.sh setup                        this repository and its requirements onto every worker
#   launch/tpu_pod.sh run --config=configs/llama_badnet.py:scale=8b --workdir=/runs/8b [flags of w2s_jax.main]
#   launch/tpu_pod.sh delete
# Edit the five lines below. --workdir must lie where all workers see the same files (a Filestore share mounted on
# /runs, say). A preempted run exits with 143; `run` again goes on from its last checkpoint.
set -euo pipefail
name=${TPU_NAME:-w2s}
zone=${ZONE:-us-central1-a}
accelerator=${ACCELERATOR:-v5litepod-16}
runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
share=${SHARE:-}                       # e.g. 10.0.0.2:/runs, mounted on /runs by setup

on_all_workers() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

verb=${1:?usage: launch/tpu_pod.sh create|setup|run|delete}
shift
case $verb in
  create)
    gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
      --accelerator-type="$accelerator" --runtime-version="$runtime"
    until gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' |
      grep -qx ACTIVE; do sleep 30; done ;;
  setup)
    git archive --format=tar.gz -o /tmp/w2s_jax.tar.gz HEAD
    gcloud compute tpus tpu-vm scp /tmp/w2s_jax.tar.gz "$name": --zone="$zone" --worker=all
    on_all_workers "mkdir -p w2s_jax && tar xzf w2s_jax.tar.gz -C w2s_jax && python3 -m venv .venv && \
      .venv/bin/pip install -q -r w2s_jax/requirements.txt 'jax[tpu]'"
    if [ -n "$share" ]; then
      on_all_workers "sudo mkdir -p /runs && (mountpoint -q /runs || sudo mount -o rw $share /runs)"
    fi ;;
  run) on_all_workers "cd w2s_jax && ../.venv/bin/python -m w2s_jax.main --distributed $(printf '%q ' "$@")" ;;
  delete) gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force ;;
  *) echo "unknown: $verb (want create, setup, run or delete)" >&2 && exit 2 ;;
esac
