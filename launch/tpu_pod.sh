#!/usr/bin/env bash
# Runs on a TPU pod slice with gcloud: every worker runs the same command, and JAX finds the other workers.
#   launch/tpu_pod.sh create                       requests the slice (a queued resource) and waits for it
#   launch/tpu_pod.sh setup                        copies this repository to every worker, installs its requirements
#   launch/tpu_pod.sh run --config=configs/llama_badnet.py:scale=8b --workdir=/runs/8b [flags of w2s_jax.main]
#   launch/tpu_pod.sh delete
# Edit the five lines below. All workers must see the same files in --workdir, so set SHARE to a Filestore share, which
# setup mounts on /runs. setup copies the last commit, without uncommitted changes. If HF_TOKEN is set, setup also
# writes it to a file, for weights behind a licence such as Llama's. `run` ends when its SSH sessions end, so start it
# in tmux. A preempted slice is lost. Then delete, create and setup make a new one, on which `run` resumes from its last
# checkpoint.
set -euo pipefail
name=${TPU_NAME:-w2s}
zone=${ZONE:-us-central1-a}
accelerator=${ACCELERATOR:-v5litepod-16}
runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
share=${SHARE:-}                       # e.g. 10.0.0.2:/runs, mounted on /runs by setup

on_all_workers() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
to_all_workers() { gcloud compute tpus tpu-vm scp "$1" "$name:$2" --zone="$zone" --worker=all; }

verb=${1:-}
shift $(($# > 0))
case $verb in
  create)
    gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
      --accelerator-type="$accelerator" --runtime-version="$runtime"
    while state=$(gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)') &&
      [ "$state" != ACTIVE ]; do
      case $state in FAILED | SUSPENDED) echo "the slice is $state: delete it and ask again" >&2 && exit 1 ;; esac
      sleep 30
    done ;;
  setup)
    git -C "$(dirname "$0")/.." archive --format=tar.gz -o /tmp/w2s_jax.tar.gz HEAD
    to_all_workers /tmp/w2s_jax.tar.gz ""
    # uv installs a Python, because the image's may be older than 3.11
    on_all_workers "mkdir -p w2s_jax && tar xzf w2s_jax.tar.gz -C w2s_jax && curl -LsSf https://astral.sh/uv/install.sh | \
      sh && ~/.local/bin/uv venv -q --python 3.12 .venv && \
      ~/.local/bin/uv pip install -q -p .venv -r w2s_jax/requirements.txt 'jax[tpu]'"
    if [ -n "${HF_TOKEN:-}" ]; then    # in a file, because all users of a machine see its command lines
      token=$(mktemp)
      trap 'rm -f "$token"' EXIT
      printf %s "$HF_TOKEN" > "$token"
      on_all_workers "mkdir -p -m 700 .cache/huggingface"
      to_all_workers "$token" .cache/huggingface/token
      on_all_workers "chmod 600 .cache/huggingface/token"
    fi
    if [ -n "$share" ]; then
      on_all_workers "sudo apt-get install -qy nfs-common && sudo mkdir -p /runs && \
        (mountpoint -q /runs || sudo mount -o rw $share /runs) && sudo chmod 1777 /runs"
    fi ;;
  run) on_all_workers "cd w2s_jax && ../.venv/bin/python -m w2s_jax.main --distributed $(printf '%q ' "$@")" ;;
  delete) gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force ;;
  *) echo "usage: launch/tpu_pod.sh create|setup|run|delete (got '$verb')" >&2 && exit 2 ;;
esac
