"""The LoRA distillation step on an accelerator: real tokens per second and model FLOPs utilisation, as JSON lines.

  python benchmarks/accelerator.py [--size=8b] [--rank=512] [--lengths=128,512] [--rows=8,16,32,64]
      [--remats=none,dots,full] [--data=DIR] [--seeds=1,5] [--pytorch-python=PYTHON]

Every combination of length, rows and remat is tried; one that does not fit is said to. 8b is Llama-3-8B's shape, 7b
Qwen2.5-7B's. Rows are full, every slot a token; with --data a batch is so many texts of a corpus (as in padding.py),
cut at the length: we pack them, the peer pads them to the longest. --seeds trains so many students at once over one
frozen base. --pytorch-python (an interpreter with torch and peft) runs the same batches with transformers and peft on
the same device first; `ratio_pytorch` is our tokens per second over theirs, the best of each.

Model FLOPs are those that the step's result needs (forward and backward to the inputs through every frozen kernel,
forward and both backwards through the adapters, causal attention within each text), whatever padding and remat compute
more; utilisation is their rate over the chip's peak. `compiler_bytes` is what the compiler says the step holds,
`peak_bytes` the most that the device held so far. --profile=DIR writes a trace of three steps of the best line, for
xprof or Perfetto, and prints where their time went.
"""

import argparse
import collections
import itertools
import json
import statistics
import subprocess
from pathlib import Path

import jax
import numpy as np
import padding
import step

from w2s_jax import sharding
from w2s_jax.data import batches, packing

# Dense bfloat16 peak in FLOP/s by `device_kind`, from the makers' data sheets.
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12,
         "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA L4": 121e12, "TPU v4": 275e12, "TPU v5 lite": 197e12,
         "TPU v5": 459e12, "TPU v6 lite": 918e12}


def model_flops(config, rank, lengths):
  """Of one step of texts of so many tokens each."""
  c, heads, lengths = config, config.num_heads * config.head_dim, np.asarray(lengths, float)
  kv = c.num_kv_heads * c.head_dim
  kernels = c.num_layers * (2 * c.hidden_size * (heads + kv) + 3 * c.hidden_size * c.intermediate_size)
  adapters = c.num_layers * rank * (2 * c.hidden_size + heads + kv)          # on q and v
  attention = c.num_layers * 2 * heads / 2                                   # scores and values, half of them causal
  return lengths.sum() * (2 * 2 * kernels + 3 * 2 * adapters) + np.square(lengths).sum() * 3 * 2 * attention


def make_cases(args, config):
  """{(length, rows): (batches, lengths of each batch's texts)}, a batch more than are timed, all of one shape."""
  count, cases = args.steps + 1, {}
  for length, rows in itertools.product(args.lengths, args.rows):
    if not args.data:
      cases[length, rows] = [step.random_batch(config, rows, length)] * count, [[length] * rows] * count
      continue
    arrays = padding.encoded(args.data, length)
    of_all = step.random_batch(config, len(arrays["length"]), 1)
    arrays |= {name: of_all[name] for name in ("label", "teacher_logits", "teacher_features")}
    pack, = packing.packers([arrays], [0], rows, padding.buckets(length), 1, count, 0)
    cases[length, rows] = [list(itertools.islice(batches.train_batches(len(arrays["length"]), rows, make, 0, 0), count))
                           for make in (pack, lambda rows: arrays["length"][rows].tolist())]
  return cases


def rates(lengths, seconds):
  """{"step_s", "tokens_per_s"}: medians over the steps."""
  tokens = [sum(one) for one in lengths]
  return {"step_s": statistics.median(seconds),
          "tokens_per_s": statistics.median(t / s for t, s in zip(tokens, seconds, strict=True))}


def pytorch(args, cases):
  """The peer's lines, printed as they come."""
  given = {"config": step.hf_config(args.size), "cases": [
      {"length": length, "rows": rows, "lengths": lengths} for (length, rows), (_, lengths) in cases.items()]}
  command = [args.pytorch_python, Path(__file__).with_name("peer_pytorch_step.py"), f"--rank={args.rank}",
             f"--dtype={args.dtype}"]
  out = subprocess.run(command, input=json.dumps(given), stdout=subprocess.PIPE, text=True, check=True).stdout
  lines = []
  for line in map(json.loads, out.splitlines()):
    if seconds := line.pop("seconds", None):
      line |= rates(cases[line["length"], line["rows"]][1][1:], seconds[1:])
    print(json.dumps(line), flush=True)
    lines.append(line)
  return lines


def where_the_time_went(directory):
  """{kernel: share of the device's busy time} of the 12 largest in the latest trace."""
  file = max(Path(directory).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  times = collections.Counter()
  for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
    for line in plane.lines if plane.name.startswith("/device:") else ():
      for event in line.events if line.name.startswith(("Stream", "XLA Ops")) else ():
        times[event.name] += event.duration_ns
  return {name: time / times.total() for name, time in times.most_common(12)}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="8b", choices=step.SIZES)
  parser.add_argument("--rank", type=int, default=512)
  parser.add_argument("--lengths", type=step.numbers, default=[128])
  parser.add_argument("--rows", type=step.numbers, default=[8, 16, 32, 64])
  parser.add_argument("--data", help="SST-2 or IMDB: batches of --rows of its texts instead of full rows")
  parser.add_argument("--remats", default="none,dots,full")
  parser.add_argument("--seeds", type=step.numbers, default=[1], help="students that train at once")
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--pytorch-python", help="interpreter of the PyTorch peer; without it there is none")
  parser.add_argument("--profile", help="directory for a trace")
  args = parser.parse_args()
  cases = make_cases(args, step.student(args.size).config)
  peers = pytorch(args, cases) if args.pytorch_python else []       # before JAX takes the device's memory
  mesh, kind, best = sharding.make_mesh(), jax.devices()[0].device_kind, None
  for remat, ((length, rows), (host_batches, lengths)), seeds in itertools.product(
      args.remats.split(","), cases.items(), args.seeds):
    model = step.student(args.size, dtype=args.dtype, remat=remat)
    line = {"size": args.size, "device": kind, "devices": jax.device_count(), "rank": args.rank, "length": length,
            "rows": rows, "shape": host_batches[0]["input_ids"].shape, "remat": remat, "seeds": seeds}
    try:
      (first, *seconds), memory = step.timed_steps(model, args.rank, host_batches, mesh, seeds=seeds)
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      print(json.dumps(line | {"error": "out of memory"}), flush=True)
      continue
    line |= {"first_s": round(first, 2)} | rates([one * seeds for one in lengths[1:]], seconds)
    flops, peak = model_flops(model.config, args.rank, sum(lengths, [])) / sum(map(sum, lengths)), PEAKS.get(kind)
    line |= {"model_flops_per_token": flops, "mfu": peak and flops * line["tokens_per_s"] / peak / jax.device_count(),
             "compiler_bytes": (memory.argument_size_in_bytes + memory.temp_size_in_bytes
                                + memory.output_size_in_bytes - memory.alias_size_in_bytes),
             "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}
    print(json.dumps(line), flush=True)
    if best is None or line["tokens_per_s"] > best["tokens_per_s"]:
      best = line
  if best is None:
    raise SystemExit("nothing fitted: fewer --rows, --remats=full, or a smaller --size")
  result = {"best": best}
  if theirs := [line["tokens_per_s"] for line in peers if "tokens_per_s" in line]:
    result["ratio_pytorch"] = best["tokens_per_s"] / max(theirs)
  if args.profile:
    model = step.student(args.size, dtype=args.dtype, remat=best["remat"])
    with jax.profiler.trace(args.profile):
      step.timed_steps(model, args.rank, cases[best["length"], best["rows"]][0][:4], mesh, seeds=best["seeds"])
    result["where_the_time_went"] = where_the_time_went(args.profile)
  print(json.dumps(result))


if __name__ == "__main__":
  main()
