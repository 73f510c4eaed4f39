"""The LoRA distillation step on an accelerator: real tokens per second and model FLOPs utilisation, as JSON lines.

  python benchmarks/accelerator.py [--size=8b] [--rank=512] [--lengths=128,512] [--rows=8,16,32,64]
      [--remats=none,dots,full] [--data=DIR] [--seeds=1,5] [--pytorch-python=PYTHON]

Every combination of length, rows and remat is tried; a line names each that does not fit. 8b is Llama-3-8B's shape, 7b
Qwen2.5-7B's. Rows are full, every slot a token; with --data a batch is so many texts of a corpus (as in padding.py),
cut at the length: we pack them, the peer pads them to the longest; `slots` are [rows, tokens]. --seeds trains so many
students at once over one frozen base. --pytorch-python (an interpreter with torch and peft) runs the same batches with
transformers and peft on the same device first; `ratio_pytorch` is the tokens per second of our best line with one
student over those of the peer's best line.

Model FLOPs are counted as usual, every token through every layer: forward and backward to the inputs through the frozen
kernels, forward and both backwards through the adapters, causal attention within each text. What padding and remat
compute more is not counted. Utilisation is their rate over the chip's published peak. `compiler_bytes` is what the
compiler says the step holds, `peak_bytes` the most that the device held since the process began. --profile=DIR writes a
trace of three steps of the best line, for xprof or Perfetto, and prints where their time went.
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

from w2s_jax import plan, sharding
from w2s_jax.data import batches, packing

CHIPS = {"NVIDIA L4": "l4", "NVIDIA A100-SXM4-40GB": "a100", "NVIDIA A100-SXM4-80GB": "a100",
         "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p",
         "TPU v6 lite": "v6e"}                                               # device_kind -> name in plan


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
  for length in args.lengths:
    if args.data:
      arrays = padding.encoded(args.data, length)
      of_all = step.random_batch(config, len(arrays["length"]), 1)
      arrays |= {name: of_all[name] for name in ("label", "teacher_logits", "teacher_features")}
    for rows in args.rows:
      if not args.data:
        cases[length, rows] = [step.random_batch(config, rows, length)] * count, [[length] * rows] * count
        continue
      pack, = packing.packers([(arrays, 0)], rows, padding.buckets(length), 1, count, flops_per_token=0,
                               pad_token_id=0, together=count)
      stream = batches.train_batches(len(arrays["length"]), rows, lambda texts: texts, 0, 0)
      chosen = list(itertools.islice(stream, count))
      cases[length, rows] = list(map(pack, chosen)), [arrays["length"][texts].tolist() for texts in chosen]
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
  lines = []
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
    json.dump(given, peer.stdin)
    peer.stdin.close()
    for line in map(json.loads, peer.stdout):
      lengths = cases[line["length"], line["rows"]][1][1:]
      line["slots"] = [line["rows"], statistics.median(map(max, lengths))]
      if seconds := line.pop("seconds", None):
        line |= rates(lengths, seconds[1:])
      print(json.dumps(line), flush=True)
      lines.append(line)
  if peer.returncode:
    raise SystemExit(f"{command[1].name} ended with {peer.returncode}")
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
  mesh, kind, lines = sharding.make_mesh(), jax.devices()[0].device_kind, []
  for remat, ((length, rows), (host_batches, lengths)), seeds in itertools.product(
      args.remats.split(","), cases.items(), args.seeds):
    model = step.student(args.size, dtype=args.dtype, remat=remat)
    line = {"size": args.size, "device": kind, "devices": jax.device_count(), "rank": args.rank, "length": length,
            "rows": rows, "slots": host_batches[0]["input_ids"].shape, "remat": remat, "seeds": seeds}
    try:
      (first, *seconds), memory = step.timed_steps(model, args.rank, host_batches, mesh, seeds=seeds)
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      print(json.dumps(line | {"error": "out of memory"}), flush=True)
      continue
    line |= {"first_s": round(first, 2)} | rates([one * seeds for one in lengths[1:]], seconds)
    flops = model_flops(model.config, args.rank, sum(lengths, [])) / sum(map(sum, lengths))
    peak = plan.CHIPS[CHIPS[kind]].flops if kind in CHIPS else None
    line |= {"model_flops_per_token": flops, "mfu": peak and flops * line["tokens_per_s"] / peak / jax.device_count(),
             "compiler_bytes": plan.bytes_of(memory)["total"],
             "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}
    print(json.dumps(line), flush=True)
    lines.append(line)
  if not lines:
    raise SystemExit("nothing fitted: fewer --rows, --remats=full, or a smaller --size")
  best = max(lines, key=lambda line: line["tokens_per_s"])
  result = {"best": best}
  of_one = [line["tokens_per_s"] for line in lines if line["seeds"] == 1]
  if (theirs := [line["tokens_per_s"] for line in peers if "tokens_per_s" in line]) and of_one:
    result["ratio_pytorch"] = max(of_one) / max(theirs)
  if args.profile:
    step.timed_steps(step.student(args.size, dtype=args.dtype, remat=best["remat"]), args.rank,
                     cases[best["length"], best["rows"]][0][:4], mesh, seeds=best["seeds"], trace=args.profile)
    result["where_the_time_went"] = where_the_time_went(args.profile)
  print(json.dumps(result))


if __name__ == "__main__":
  main()
