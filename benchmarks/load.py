"""Seconds and memory of loading and saving a model directory, as JSON. Linux only.

  python benchmarks/load.py compare [--gib=0.5,1,2,4] [--rounds=3]
  python benchmarks/load.py one DIRECTORY [--who=ours] [--dtype=bfloat16] [--mesh=DATA,FSDP,TENSOR] [--devices=8]

`compare` makes a random bfloat16 Llama of each size. This program, safetensors' own functions (safetensors.flax) and
transformers load and save it in turn, and each round begins with another of the three. For each size it prints a line
with the medians, the ratios of the medians (ours divided by theirs), and the ratios of each round. The files are in the
page cache, so the disk is not measured.

`one` is a single run, which prints:

  checkpoint_bytes                size of the safetensors files
  array_bytes, device_bytes       size of all loaded shards, in all and on each device
  overhead_bytes                  highest resident set, minus the one before loading, minus array_bytes
  seconds, cpu_seconds            of loading; CPU time is of all threads, and depends less on other work on the machine
  save_seconds, save_cpu_seconds  of saving (--save)
  save_overhead_bytes             highest resident set while saving, minus the one before
"""

import argparse
import gc
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from w2s_jax import sharding  # noqa: E402
from w2s_jax.models import load_pretrained, save_pretrained  # noqa: E402

WHO = ("ours", "safetensors", "transformers")
TIMES = ("seconds", "cpu_seconds", "save_seconds", "save_cpu_seconds")
VOCABULARY, WIDTH, FEED_FORWARD = 32000, 2048, 5632              # of the Llama of `compare`; a layer is 86 MiB


def tensor_shapes(layers, vocab_size, D, F):
  """{name: shape} of each of four shards. The first has the embeddings, and each other one a third of the layers."""
  block = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D // 4, D), "self_attn.v_proj": (D // 4, D),
           "self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
           "input_layernorm": (D,), "post_attention_layernorm": (D,)}
  return [{"model.embed_tokens.weight": (vocab_size, D), "model.norm.weight": (D,)}] + [
      {f"model.layers.{i}.{name}.weight": shape for i in range(part, layers, 3) for name, shape in block.items()}
      for part in range(3)]


def make_checkpoint(directory, layers, vocab_size, D, F):
  """Writes a bfloat16 Llama of random weights, like a published causal model: without a classifier head."""
  directory.mkdir(parents=True, exist_ok=True)
  values = np.random.default_rng(0).standard_normal(1_000_003).astype(ml_dtypes.bfloat16)
  weight_map = {}
  for i, shapes in enumerate(tensor_shapes(layers, vocab_size, D, F)):
    file = f"model-{i + 1:05}-of-00004.safetensors"
    save_file({name: np.resize(values, shape) for name, shape in shapes.items()}, directory / file,
              metadata={"format": "pt"})
    weight_map |= dict.fromkeys(shapes, file)
  (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  (directory / "config.json").write_text(json.dumps({
      "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab_size, "hidden_size": D,
      "intermediate_size": F, "num_hidden_layers": layers, "num_attention_heads": D // 64,
      "num_key_value_heads": D // 256, "tie_word_embeddings": True}))


def resident(field):
  """VmRSS (now) or VmHWM (highest so far) in bytes. getrusage's maximum would include the parent's before exec."""
  status = Path("/proc/self/status").read_text()
  return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def reader_and_writer(who, directory, dtype, mesh):
  """Three functions of one of WHO: read() -> model, write(model, directory), and arrays_of(model) -> its arrays."""
  if who == "ours":
    return (lambda: load_pretrained(directory, dtype=dtype, mesh=mesh), lambda read, out: save_pretrained(out, *read),
            lambda read: jax.tree.leaves(read[1]))
  if who == "safetensors":
    from safetensors import flax
    return (lambda: [flax.load_file(file) for file in directory.glob("*.safetensors")],
            lambda read, out: [flax.save_file(part, out / f"{i}.safetensors") for i, part in enumerate(read)],
            jax.tree.leaves)
  import torch
  import transformers
  def read():
    return transformers.AutoModelForSequenceClassification.from_pretrained(directory, dtype=getattr(torch, dtype))
  return read, lambda model, out: model.save_pretrained(out), lambda model: list(model.parameters())


def one(args):
  if args.devices:
    jax.config.update("jax_num_cpu_devices", args.devices)
  mesh = args.mesh and sharding.make_mesh(*map(int, args.mesh.split(",")))
  jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(8)))    # starts the backend and its compiler
  read, write, arrays_of = reader_and_writer(args.who, args.directory, args.dtype, mesh)
  gc.collect()
  before, start, cpu_start = resident("VmRSS"), time.perf_counter(), time.process_time()
  model = read()
  arrays = jax.block_until_ready(arrays_of(model))
  seconds, cpu_seconds, peak = time.perf_counter() - start, time.process_time() - cpu_start, resident("VmHWM")
  device_bytes = dict.fromkeys(map(str, jax.local_devices()), 0)
  for array in arrays:
    if args.who == "transformers":
      device_bytes[str(jax.local_devices()[0])] += array.nbytes
      continue
    for shard in array.addressable_shards:
      device_bytes[str(shard.device)] += shard.data.nbytes
  array_bytes = sum(device_bytes.values())
  result = {"checkpoint_bytes": sum(f.stat().st_size for f in args.directory.glob("*.safetensors")),
            "array_bytes": array_bytes, "overhead_bytes": peak - before - array_bytes, "device_bytes": device_bytes,
            "seconds": seconds, "cpu_seconds": cpu_seconds}
  if args.save:
    shutil.rmtree(args.save, ignore_errors=True)
    args.save.mkdir(parents=True)
    Path("/proc/self/clear_refs").write_text("5")                        # resets VmHWM (man 5 proc)
    before, start, cpu_start = resident("VmRSS"), time.perf_counter(), time.process_time()
    write(model, args.save)
    result |= {"save_seconds": time.perf_counter() - start, "save_cpu_seconds": time.process_time() - cpu_start,
               "save_overhead_bytes": resident("VmHWM") - before}
    shutil.rmtree(args.save)
  print(json.dumps(result))


def compare(args):
  for gib in args.gib:
    directory = args.directory / "llama"
    shutil.rmtree(directory, ignore_errors=True)
    make_checkpoint(directory, round((gib * 1024 - 125) / 86), VOCABULARY, WIDTH, FEED_FORWARD)
    runs = {who: [] for who in WHO}
    for i in range(args.rounds):
      for who in WHO[i % len(WHO):] + WHO[:i % len(WHO)]:
        out = subprocess.run([sys.executable, __file__, "one", directory, f"--who={who}",
                              f"--save={args.directory / 'saved'}"], capture_output=True, text=True)
        if out.returncode:
          sys.exit(f"{who}: {out.stderr}")
        runs[who].append(json.loads(out.stdout.splitlines()[-1]))
    medians = {who: {key: statistics.median(run[key] for run in results) for key in (
        "checkpoint_bytes", "overhead_bytes", "save_overhead_bytes", *TIMES)} for who, results in runs.items()}
    ratios = {f"{key}_ratio_{who}": medians["ours"][key] / medians[who][key] for who in WHO[1:] for key in TIMES}
    rounds = {f"{key}_ratios_{who}": [our[key] / their[key] for our, their in zip(runs["ours"], runs[who])]
              for who in WHO[1:] for key in TIMES}
    print(json.dumps({"gib": gib, **medians, **ratios, **rounds}), flush=True)
    shutil.rmtree(directory)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = parser.add_subparsers(required=True)
  command = commands.add_parser("compare")
  command.set_defaults(run=compare)
  command.add_argument("--gib", type=lambda text: [float(x) for x in text.split(",")], default=[0.5, 1, 2, 4])
  command.add_argument("--rounds", type=int, default=3, help="number of alternating runs of each")
  command.add_argument("--directory", type=Path, default=Path("runs/load"), help="where the files go")
  command = commands.add_parser("one")
  command.set_defaults(run=one)
  command.add_argument("directory", type=Path)
  command.add_argument("--who", default="ours", choices=WHO)
  command.add_argument("--dtype", default="bfloat16")
  command.add_argument("--mesh", help="sizes of the mesh axes data, fsdp, tensor; default: only the first device")
  command.add_argument("--devices", type=int, help="number of virtual CPU devices")
  command.add_argument("--save", type=Path, help="also save to this directory, which is deleted before and afterwards")
  args = parser.parse_args()
  args.run(args)


if __name__ == "__main__":
  main()
