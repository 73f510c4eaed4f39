"""The LoRA distillation step on an accelerator: real tokens per second and model FLOPs utilisation, as JSON lines.

  python benchmarks/accelerator.py [--size=8b] [--rank=512] [--lengths=128,512] [--rows=8,16,32,64]
      [--remats=none,dots,full] [--data=DIR] [--seeds=1,5] [--pytorch-python=PYTHON]

The script tries every combination of length, rows and remat. A combination that does not fit gets a line with an error.
8b is the shape of Llama-3-8B, and 7b that of Qwen2.5-7B.

Without --data every row is full of tokens. With --data a batch has --rows texts of a corpus (as in padding.py),
truncated to the length. We pack them, and the peer pads them to the longest. `slots` is the shape of a batch, [rows,
tokens]. --seeds is the number of students that train at once over one frozen base.

--pytorch-python names an interpreter with torch and peft. On the same device, before us, it runs transformers and peft
on batches of the same text lengths. `ratio_pytorch` is the tokens per second of our best line with one student, divided
by those of the peer's best line.

Model FLOPs are the usual count, of every token through every layer. Frozen kernels count the forward pass and the
backward pass to the inputs. Adapters also count the backward pass to the weights. Attention counts as causal, within
each text. The extra work of padding and remat does not count. `mfu`, the utilisation, is the rate of model FLOPs
divided by the chip's published peak.

`compiler_bytes` is the memory of the step by the compiler's count. `peak_bytes` is the most memory that the device has
held since the process began. --profile=DIR writes a trace of three steps of the best line, for xprof or Perfetto, and
prints which kernels took their time.
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
  """Model FLOPs of one step of one student. `lengths` are the numbers of tokens of the batch's texts."""
  c, heads, lengths = config, config.num_heads * config.head_dim, np.asarray(lengths, float)
  kv = c.num_kv_heads * c.head_dim
  kernels = c.num_layers * (2 * c.hidden_size * (heads + kv) + 3 * c.hidden_size * c.intermediate_size)
  adapters = c.num_layers * rank * (2 * c.hidden_size + heads + kv)          # on q and v
  attention = c.num_layers * 2 * heads / 2                                   # scores and values; causality halves both
  return lengths.sum() * (2 * 2 * kernels + 3 * 2 * adapters) + np.square(lengths).sum() * 3 * 2 * attention


def make_cases(args, config):
  """{(length, rows): (batches of one shape, text lengths of each batch)}. The first batch counts in no rate."""
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
  """{"step_s", "tokens_per_s"}: medians over the steps.

  lengths: for each step the text lengths of its batch. seconds: of each step.
  """
  tokens = [sum(texts) for texts in lengths]
  return {"step_s": statistics.median(seconds),
          "tokens_per_s": statistics.median(t / s for t, s in zip(tokens, seconds, strict=True))}


def pytorch(args, cases):
  """Runs the peer, prints its lines as they come, and returns them."""
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
  """{kernel: share of the device's busy time} of the 12 kernels with the largest shares in the latest trace."""
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
  parser.add_argument("--data", help="directory of SST-2 or IMDB; a batch has --rows of its texts instead of full rows")
  parser.add_argument("--remats", default="none,dots,full")
  parser.add_argument("--seeds", type=step.numbers, default=[1], help="numbers of students that train at once")
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--pytorch-python", help="interpreter of the PyTorch peer; default: no peer")
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
    line |= {"first_s": round(first, 2)} | rates([texts * seeds for texts in lengths[1:]], seconds)
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
  of_one_student = [line["tokens_per_s"] for line in lines if line["seeds"] == 1]
  if (theirs := [line["tokens_per_s"] for line in peers if "tokens_per_s" in line]) and of_one_student:
    result["ratio_pytorch"] = max(of_one_student) / max(theirs)
  if args.profile:
    step.timed_steps(step.student(args.size, dtype=args.dtype, remat=best["remat"]), args.rank,
                     cases[best["length"], best["rows"]][0][:4], mesh, seeds=best["seeds"], trace=args.profile)
    result["where_the_time_went"] = where_the_time_went(args.profile)
  print(json.dumps(result))


if __name__ == "__main__":
  main()
