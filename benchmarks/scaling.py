"""Which distillation step fits on which TPU slice, as w2s_jax.plan says: the Markdown table of docs/scaling.md.

  pip install 'jax[tpu]' && python benchmarks/scaling.py [--only=v5e:4x4]

Kernels are stacked over the layers, and must be gathered one layer at a time. The script exits with code 1 if the
all-gathers outside loops have more bytes than one layer of the largest kernel.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")

from w2s_jax import plan, sharding  # noqa: E402
from w2s_jax.planning import abstract, hlo  # noqa: E402

MODELS = {"Llama-3-8B": ("llama_badnet", "scale=8b"), "Llama-3-70B": ("llama_badnet", "scale=70b"),
          "Qwen2.5-7B": ("qwen_badnet", "scale=7b")}
SMALL, LARGE = (32, 128), (128, 512)                       # rows, tokens
# The axis fsdp is as large as the number of rows allows. The other chips are on the axis tensor.
CASES = [("Llama-3-8B", topology, batch) for topology in ("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:16x16")
         for batch in (SMALL, LARGE)]
CASES += [("Llama-3-70B", topology, batch) for topology in ("v5p:4x4x4", "v5e:16x16") for batch in (SMALL, LARGE)]
CASES += [("Qwen2.5-7B", "v6e:2x4", batch) for batch in (SMALL, LARGE)]


def layer_bytes(config):
  """Bytes of one layer of the largest kernel, in bfloat16."""
  layers = jax.tree.leaves(abstract.student(config).abstract_params()["layers"])
  return max(leaf.size // leaf.shape[0] * 2 for leaf in layers)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", help="only this topology")
  args = parser.parse_args()
  print("| model | slice | mesh data, fsdp, tensor | rows x tokens | remat | fits "
        "| GiB per chip: arguments + temporaries | of | TFLOP per chip "
        f"| GB per chip: {', '.join(hlo.KINDS)} | gathered outside loops | s a step (estimate) |")
  print("|" + "---|" * 12)
  wrong = []
  for name, topology, (B, T) in CASES:
    if args.only not in (None, topology):
      continue
    file, argument = MODELS[name]
    config = runpy.run_path(str(ROOT / f"configs/{file}.py"))["get_config"](argument)
    devices, tpu = plan.devices_of(topology)
    if not tpu:
      sys.exit("no TPU compiler here: pip install 'jax[tpu]'")
    fsdp = min(B, len(devices))
    if topology == "v5p:4x4x4" and fsdp == 32:               # 32 is no product of the sides of 4x4x4
      fsdp = 16
    shape = (1, fsdp, len(devices) // fsdp)
    planned = plan.plan_step("w2s", config, sharding.make_mesh(*shape, devices=devices), B, T, topology, tpu)
    cells = [name, topology, ", ".join(map(str, shape)), f"{B} x {T}", config.student.remat,
             "yes" if planned["fits"] else "no"]
    if "error" in planned:
      reason, hbm = planned["error"].partition(": ")[2].rstrip("."), planned["per_chip"]["hbm"]
      cells += [reason, f"{hbm / plan.GIB:.0f}", *["-"] * 4]
    else:
      memory, moved = planned["per_chip"], planned["collectives"]
      outside = planned["collectives_outside_loops"].get("all-gather", {"bytes": 0})["bytes"]
      if outside > layer_bytes(config):
        wrong.append(cells)
      cells += [f"{memory['arguments'] / plan.GIB:.2f} + {memory['temporaries'] / plan.GIB:.2f}",
                f"{memory['hbm'] / plan.GIB:.0f}", f"{planned['flops'] / 1e12:.1f}",
                ", ".join(f"{moved[kind]['bytes'] / 1e9:.2f}" if kind in moved else "0" for kind in hlo.KINDS),
                f"{outside / 1e9:.3f}", f"{planned['step_seconds_estimate']:.2f}"]
    print("| " + " | ".join(cells) + " |", flush=True)
  if wrong:
    sys.exit(f"gather more than a layer's kernel outside loops: {wrong}")


if __name__ == "__main__":
  main()
