"""The LoRA distillation step on an accelerator: tokens per second and model FLOPs utilisation, as JSON lines.

  python benchmarks/accelerator.py [--size=8b] [--rank=512] [--lengths=128,512] [--rows=8,16,32,64]
      [--remats=none,dots,full] [--pytorch-python=PYTHON]

Every combination of length, rows and remat is tried; one that does not fit is said to. 8b is Llama-3-8B's shape, 7b
Qwen2.5-7B's. --pytorch-python (an interpreter with torch and peft) runs the same step with transformers and peft on the
same device first; `ratio_pytorch` is our tokens per second over theirs, the best of each. `peak_bytes` is the most that
the device held so far. Model FLOPs are those that the step's
result needs (forward and backward to the inputs through every frozen kernel, forward and both backwards through the
adapters, causal attention), whatever remat computes again; utilisation is their rate over the chip's peak. The batch's
rows are full: tokens are real ones. --profile=DIR writes a trace of the best one, for xprof or Perfetto.
"""

import argparse
import itertools
import json
import subprocess
from pathlib import Path

import jax
import step

from w2s_jax import sharding

# Dense bfloat16 peak in FLOP/s by `device_kind`, from the makers' data sheets.
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12,
         "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA L4": 121e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
         "TPU v5": 459e12, "TPU v6 lite": 918e12}


def model_flops(config, rank, rows, length):
  """Of one step of `rows` texts of `length` tokens."""
  c, heads = config, config.num_heads * config.head_dim
  kv = c.num_kv_heads * c.head_dim
  kernels = c.num_layers * (2 * c.hidden_size * (heads + kv) + 3 * c.hidden_size * c.intermediate_size)
  adapters = c.num_layers * rank * (2 * c.hidden_size + heads + kv)          # on q and v
  attention = c.num_layers * 2 * heads * length / 2                          # scores and values, half of them causal
  return rows * length * (2 * 2 * kernels + 3 * 2 * adapters + 3 * 2 * attention)


def pytorch(args):
  """The peer's lines of every length, printed as they come."""
  lines = []
  for length in args.lengths:
    command = [args.pytorch_python, Path(__file__).with_name("peer_pytorch_step.py"),
               json.dumps(step.hf_config(args.size)), f"--rank={args.rank}", f"--length={length}",
               f"--rows={','.join(map(str, args.rows))}", f"--dtype={args.dtype}", f"--steps={args.steps}"]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(out, end="", flush=True)
    lines += map(json.loads, out.splitlines())
  return lines


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="8b", choices=step.SIZES)
  parser.add_argument("--rank", type=int, default=512)
  parser.add_argument("--lengths", type=step.numbers, default=[128])
  parser.add_argument("--rows", type=step.numbers, default=[8, 16, 32, 64])
  parser.add_argument("--remats", default="none,dots,full")
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--pytorch-python", help="interpreter of the PyTorch peer; without it there is none")
  parser.add_argument("--profile", help="directory for a trace")
  args = parser.parse_args()
  peers = pytorch(args) if args.pytorch_python else []       # before JAX takes the device's memory
  mesh, kind = sharding.make_mesh(), jax.devices()[0].device_kind
  best = None
  for remat in args.remats.split(","):
    model = step.student(args.size, dtype=args.dtype, remat=remat)
    for length, rows in itertools.product(args.lengths, args.rows):
      line = {"size": args.size, "device": kind, "devices": jax.device_count(), "rank": args.rank,
              "length": length, "rows": rows, "remat": remat}
      try:
        first, seconds = step.timed_steps(model, args.rank, rows, length, mesh, args.steps)
      except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
          raise
        print(json.dumps(line | {"error": "out of memory"}), flush=True)
        continue
      flops = model_flops(model.config, args.rank, rows, length)
      peak = PEAKS.get(kind)
      line |= {"first_s": round(first, 2), "step_s": seconds, "tokens_per_s": rows * length / seconds,
               "model_flops": flops, "mfu": peak and flops / seconds / peak / jax.device_count(),
               "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}
      print(json.dumps(line), flush=True)
      if best is None or line["tokens_per_s"] > best["tokens_per_s"]:
        best = line
  if best is None:
    raise SystemExit("nothing fitted: fewer --rows, --remats=full, or a smaller --size")
  result = {"best": best}
  if rates := [line["tokens_per_s"] for line in peers if "tokens_per_s" in line]:
    result["ratio_pytorch"] = best["tokens_per_s"] / max(rates)
  print(json.dumps(result))
  if args.profile:
    with jax.profiler.trace(args.profile):
      model = step.student(args.size, dtype=args.dtype, remat=best["remat"])
      step.timed_steps(model, args.rank, best["rows"], best["length"], mesh, 3)


if __name__ == "__main__":
  main()
