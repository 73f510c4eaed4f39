"""What loading a model directory takes in resident memory above the loaded arrays themselves, as JSON. Linux only.

  python benchmarks/load_memory.py DIRECTORY [--dtype=bfloat16] [--mesh=DATA,FSDP,TENSOR] [--devices=8]

Keys: checkpoint_bytes (of the safetensors files), array_bytes (of all shards here), overhead_bytes (the process's
highest resident set, less the one before loading, less array_bytes), device_bytes (of each device's shards), seconds.
"""

import argparse
import gc
import json
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402

from w2s_jax import sharding  # noqa: E402
from w2s_jax.models import load_pretrained  # noqa: E402


def resident(field):
  """VmRSS (now) or VmHWM (highest so far) in bytes; getrusage's maximum would count the parent's before exec."""
  status = Path("/proc/self/status").read_text()
  return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("directory", type=Path)
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--mesh", help="sizes of data, fsdp and tensor; without it everything lies on the first device")
  parser.add_argument("--devices", type=int, help="virtual CPU devices")
  args = parser.parse_args()
  if args.devices:
    jax.config.update("jax_num_cpu_devices", args.devices)
  mesh = args.mesh and sharding.make_mesh(*map(int, args.mesh.split(",")))
  jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(8)))    # the backend and its compiler are up
  gc.collect()
  before, start = resident("VmRSS"), time.perf_counter()
  _, params = load_pretrained(args.directory, dtype=args.dtype, mesh=mesh)
  jax.block_until_ready(params)
  seconds, peak = time.perf_counter() - start, resident("VmHWM")
  shards = [shard for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
  device_bytes = dict.fromkeys(map(str, jax.local_devices()), 0)
  for shard in shards:
    device_bytes[str(shard.device)] += shard.data.nbytes
  array_bytes = sum(device_bytes.values())
  print(json.dumps({
      "checkpoint_bytes": sum(f.stat().st_size for f in args.directory.glob("*.safetensors")),
      "array_bytes": array_bytes, "overhead_bytes": peak - before - array_bytes, "device_bytes": device_bytes,
      "seconds": round(seconds, 1)}))


if __name__ == "__main__":
  main()
