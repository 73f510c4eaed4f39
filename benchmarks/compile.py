"""Seconds to lower and to compile a step of abstract parameters, and the memory that it needs, as JSON lines.

  python benchmarks/compile.py [--size=8b] [--layers=4,32] [--rank=512] [--rows=8] [--length=128] [--remat=full]
      [--quantize=int8] [--topology=v5e:1x1]

--topology compiles for a TPU slice. This machine needs libtpu (pip install 'jax[tpu]'), but no TPU. Without --topology
the script compiles for this machine's devices. Bytes are per device.
"""

import argparse
import dataclasses
import json
import sys
import time

import step

from w2s_jax import plan, sharding
from w2s_jax.models import Model

BYTES = ("argument_size_in_bytes", "temp_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="8b", choices=step.SIZES)
  parser.add_argument("--layers", type=step.numbers, default=[4, 32])
  parser.add_argument("--rank", type=int, default=512)
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--length", type=int, default=128)
  parser.add_argument("--remat", default="full")
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--quantize", default="", help="format of the frozen layers: int8, int4 or nf4; default: --dtype")
  parser.add_argument("--topology", help="TPU slice, e.g. v5e:1x1 or v5e:2x2")
  args = parser.parse_args()
  devices = None
  if args.topology:
    devices, tpu = plan.devices_of(args.topology)
    if not tpu:
      sys.exit(f"--topology={args.topology}: want a TPU's, with its compiler here (pip install 'jax[tpu]'); GPUs are "
               "w2s_jax.plan's")
  mesh = sharding.make_mesh(data=1, fsdp=-1, devices=devices)
  for layers in args.layers:
    config = dataclasses.replace(step.student(args.size, dtype=args.dtype, remat=args.remat).config, num_layers=layers)
    start = time.perf_counter()
    lowered = step.lowered(Model(config), args.rank, args.rows, args.length, mesh, args.quantize)
    middle = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    print(json.dumps({"size": args.size, "layers": layers, "quantize": args.quantize, "topology": args.topology,
                      "lower_s": round(middle - start, 2), "compile_s": round(time.perf_counter() - middle, 2),
                      **{key: getattr(memory, key) for key in BYTES},
                      "total_bytes": plan.bytes_of(memory)["total"]}),
          flush=True)


if __name__ == "__main__":
  main()
