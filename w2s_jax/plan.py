"""Does a config fit? Compiles the steps of its run ahead of time for TPUs or GPUs that this machine does not have.

  python -m w2s_jax.plan --config=configs/llama_badnet.py:scale=8b --topology=v5e:4x4
  ... --mesh=1,16,1 --batch=128 --length=512 --remat=dots        overrides the config
  ... --search                                                   tries meshes, remat policies and batch sizes
  ... --json                                                     prints one JSON object

The step `defend` is the step of the costliest configured defense; --step=w2s plans w2s.
For TPUs it uses XLA's TPU compiler (pip install 'jax[tpu]'), which needs no TPU. Without that compiler it plans for the
same number of CPUs, whose memory figures differ from the chip's. For GPUs (--topology=h100:1, h200:8) it uses the CPU
compiler of jax 0.11, which planned up to 5% more memory than an H200 held (docs/scaling.md). Times are estimates from
the chip's published peak figures.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from w2s_jax import InputError, command

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "CHIP:SHAPE, e.g. v5e:4x4, v5p:4x4x4, v6e:2x4 or h100:8.")
_MESH = flags.DEFINE_string("mesh", None, "DATA,FSDP,TENSOR; one may be -1, the remaining chips; default: config's.")
_BATCH = flags.DEFINE_integer("batch", None, "Examples per step, over all chips; default: that of the step's stage.",
                              lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", None, "Tokens per row; default: that of the step's stage.", lower_bound=4)
_REMAT = flags.DEFINE_string("remat", None, "What the backward pass recomputes: none, dots or full; default: config's.")
_STEP = flags.DEFINE_list("step", ["defend", "poison", "evaluate"], "Steps to plan; --search takes the first.")
_SEARCH = flags.DEFINE_bool("search", False, "Try mesh shapes, remat policies and batch sizes.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of one chip (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; NVIDIA's data sheets)."""
  flops: float               # per second, in bfloat16
  hbm: float                 # bytes
  hbm_bandwidth: float       # bytes per second
  link_bandwidth: float      # bytes per second sent over all links to other chips; half of a "bidirectional" figure


CHIPS = {"v4": Chip(275e12, 32 * GIB, 1200e9, 300e9), "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9),
         "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9), "v6e": Chip(918e12, 32 * GIB, 1600e9, 400e9)}
# Memory as nvidia-smi reports it. Links in one direction: PCIe for l4, NVLink for the other GPUs.
GPUS = {"l4": Chip(121e12, 22.5 * GIB, 300e9, 32e9), "a100": Chip(312e12, 80 * GIB, 2039e9, 300e9),
        "h100": Chip(989e12, 79.6 * GIB, 3350e9, 450e9), "h200": Chip(989e12, 140.4 * GIB, 4800e9, 450e9)}
CHIPS |= GPUS


def usable(name: str) -> float:
  """Bytes of a chip that a program can use: 15.75/16 of a TPU's memory (v5e's compiler), JAX's share of a GPU's."""
  share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75)) if name in GPUS else 0.984
  return share * CHIPS[name].hbm


def parse_topology(text: str) -> tuple[str, int]:
  """(chip, number of chips): ("v5e", 16) for "v5e:4x4"; InputError for an unknown chip or a malformed shape."""
  chip, _, shape = text.partition(":")
  if chip not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
    raise InputError(f"topology {text!r}: want CHIP:SHAPE with CHIP among {', '.join(CHIPS)}, e.g. v5e:4x4")
  return chip, math.prod(map(int, shape.split("x")))


def tpu_compiler() -> bool:
  """Whether XLA's TPU compiler is installed."""
  return importlib.util.find_spec("libtpu") is not None


def devices_of(text: str) -> tuple[Sequence, bool]:
  """(devices to compile for, whether they are TPUs), from CHIP:SHAPE.

  For TPUs the devices are descriptions. For GPUs, or without a TPU compiler, they are the same number of CPUs.
  """
  import jax
  chip, chips = parse_topology(text)
  if chip in GPUS and jax.__version_info__ < (0, 11):
    raise InputError(f"topology {text!r}: this jax {jax.__version__} compiles bfloat16 as float32 on CPUs, which "
                     "doubles the planned memory: pip install 'jax>=0.11' (Python 3.12 or later)")
  if chip in GPUS:
    return _cpus(chips, "planned with the CPU compiler; one H200 held 4 to 5% less memory than planned"), False
  if not tpu_compiler():
    return _cpus(chips, "no TPU compiler here (pip install 'jax[tpu]'): planned for CPUs, whose memory figures "
                        "differ from the chip's"), False
  from jax.experimental import topologies
  options = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
  try:
    with _silent():
      return topologies.get_topology_desc(platform="tpu", topology_name=text, **options).devices, True
  except Exception as e:  # the compiler raises its own types
    raise InputError(f"the TPU compiler does not know topology {text!r} ({str(e).splitlines()[0][:200]})") from e


def _cpus(count, note):
  import jax
  print(note, file=sys.stderr)
  if count > len(jax.devices()):
    raise InputError(f"a plan for {count} chips needs {count} CPU devices, this process has {len(jax.devices())}: set "
                     f"JAX_NUM_CPU_DEVICES={count}")
  return jax.devices()[:count]


@contextlib.contextmanager
def _silent():
  """Silences the file descriptor of stderr, because libtpu writes to it that this machine has no TPU."""
  saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 2)
  try:
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(null)


def plan_step(name: str, config: Any, mesh: Any, B: int, T: int, topology: str, tpu: bool) -> dict:
  """The costs of one step per chip, as the fields of --json; with "error" if the compiler finds too little memory.

  name is the step, B its rows, T its tokens per row, topology CHIP:SHAPE; tpu tells whether the TPU compiler is used.
  """
  import jax

  from w2s_jax.planning import abstract, hlo
  chip_name, _ = parse_topology(topology)
  chip = CHIPS[chip_name]
  chips = mesh.devices.size
  model = abstract.student(config)
  defense = abstract.costliest(config) if name == "defend" else None
  out = {"step": name, "defense": defense, "topology": topology, "chips": chips, "mesh": dict(mesh.shape),
         "batch": B, "length": T, "remat": config.student.remat, "compiler": "tpu" if tpu else "cpu"}
  lowered = abstract.lower(name, config, mesh, B, T, model)
  try:
    with _silent():
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    unknown = dict.fromkeys(("arguments", "temporaries", "output", "total"))
    return out | {"fits": False, "per_chip": unknown | {"hbm": chip.hbm}, "flops": None, "collectives": {},
                  "step_seconds_estimate": None, "error": str(e).splitlines()[0]}
  per_chip = bytes_of(compiled.memory_analysis()) | {"hbm": chip.hbm}
  collectives = hlo.collectives(compiled.as_text())
  flops, nbytes = _work(name, config, mesh, B, T, model)
  moved_bytes = sum(total["bytes"] for total in hlo.totals(collectives).values())
  seconds = {"arithmetic": flops / chip.flops, "bandwidth": nbytes / chip.hbm_bandwidth,
             "links": moved_bytes / chip.link_bandwidth}
  return out | {
      "fits": per_chip["total"] <= usable(chip_name), "per_chip": per_chip, "flops": flops, "bytes": nbytes,
      "collectives": hlo.totals(collectives),
      "collectives_outside_loops": hlo.totals([c for c in collectives if not c[3]]),
      "seconds": seconds, "step_seconds_estimate": max(seconds.values())}


def bytes_of(memory: Any) -> dict[str, int]:
  """Bytes that a program holds on each device, from its memory_analysis(). Donated arguments do not count as output."""
  out = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
         "output": memory.output_size_in_bytes - memory.alias_size_in_bytes}
  return out | {"total": sum(out.values())}


def _work(name, config, mesh, B, T, model):
  """(FLOPs, bytes of HBM traffic) per chip by the compiler's count.

  The compiler counts a loop as one iteration. So this function compiles a network of one layer and one of two layers,
  both without a loop. For each layer after the first it adds the difference between the two counts.
  """
  from w2s_jax.models import Model
  from w2s_jax.planning import abstract
  counts = []
  for layers in (1, 2):
    small_model = Model(dataclasses.replace(model.config, num_layers=layers, unroll=True))
    with _silent():
      cost = abstract.lower(name, config, mesh, B, T, small_model).compile().cost_analysis()
    counts.append((cost["flops"], cost["bytes accessed"]))
  return tuple(first + (model.config.num_layers - 1) * (second - first) for first, second in zip(*counts))


def search(name: str, config: Any, devices: Sequence, B: int, T: int, topology: str, tpu: bool) -> list[dict]:
  """Plans the step `name` in several ways. Returns the plans that fit, most rows per second first, then the rest.

  It tries meshes with at most 8 chips on `data` and on `tensor`, and the batch sizes B, 2 B and B / 2. For each pair of
  mesh and batch size it stops at the first remat policy that fits, from "none" to "full".
  """
  from w2s_jax import sharding
  from w2s_jax.planning import abstract
  abstract.lower(name, config, sharding.make_mesh(1, 1, 1, devices=devices[:1]), B, T)   # raises if the config is wrong
  chips, plans = len(devices), []
  shapes = [(data, chips // data // tensor, tensor) for tensor in (1, 2, 4, 8) for data in (1, 2, 4, 8)
            if chips % (data * tensor) == 0]
  pairs = [(rows, shape) for rows, shape in itertools.product(dict.fromkeys((B, 2 * B, B // 2)), shapes)
           if rows and rows % (shape[0] * shape[1]) == 0]
  print(f"trying {len(pairs)} pairs of mesh and batch size, each with up to three remat policies (a large model takes "
        "minutes each)", file=sys.stderr, flush=True)
  for rows, shape in pairs:
    for remat in ("none", "dots", "full"):
      candidate = config.copy_and_resolve_references()
      candidate.student.remat = remat
      try:
        plan = plan_step(name, candidate, sharding.make_mesh(*shape, devices=devices), rows, T, topology, tpu)
      except InputError:                            # a mesh axis does not divide a leaf
        break
      plans.append(plan)
      print(f"  mesh {shape} batch {rows} remat {remat}: {_verdict(plan)}", file=sys.stderr, flush=True)
      if plan["fits"]:
        break
  return sorted(plans, key=lambda plan: -plan["batch"] / plan["step_seconds_estimate"] if plan["fits"] else 0)


def _verdict(plan):
  if "error" in plan:
    return f"does not fit: {plan['error']}"
  memory = f"{plan['per_chip']['total'] / GIB:.2f} of {plan['per_chip']['hbm'] / GIB:.0f} GiB"
  return (f"{'fits' if plan['fits'] else 'does not fit'}, {memory}, about {plan['step_seconds_estimate']:.3f} s a step "
          "(estimate)")


def text(plan: dict) -> str:
  """A plan as lines of text."""
  mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
  step = f"{plan['step']} ({plan['defense']})" if plan["defense"] else plan["step"]
  lines = [f"{step}: {plan['topology']} ({plan['chips']} chips), mesh {mesh}; {plan['batch']} examples of "
           f"{plan['length']} tokens, remat {plan['remat']}", f"  {_verdict(plan)}"]
  if "error" in plan:
    return "\n".join(lines)
  memory = ", ".join(f"{name} {plan['per_chip'][name] / GIB:.2f}" for name in ("arguments", "temporaries", "output"))
  lines.append(f"  GiB per chip: {memory}")
  lines.append(f"  per chip and step: {plan['flops'] / 1e12:.2f} TFLOP, {plan['bytes'] / 1e9:.1f} GB of HBM traffic")
  lines += [f"  {kind}: {c['count']} times, {c['bytes'] / 1e9:.2f} GB" for kind, c in plan["collectives"].items()]
  bound = max(plan["seconds"], key=plan["seconds"].get)
  lines.append(f"  estimate by published figures: {plan['step_seconds_estimate']:.3f} s a step, bound by {bound} ("
               + ", ".join(f"{name} {s:.3f} s" for name, s in plan["seconds"].items()) + ")")
  return "\n".join(lines)


def _shape(config, name):
  """(rows, tokens) of a step, one text per row: from the flags, or from the config of the step's stage."""
  if name == "evaluate":
    rows = config.data.eval_batch_size
  else:
    rows = config["poison" if name == "poison" else "defend"].batch_size
  tokens = config.data.attack_max_length if name == "poison" else config.data.max_length
  return _BATCH.value or rows, _LENGTH.value or tokens


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  import jax
  jax.config.update("jax_platforms", "cpu")

  from w2s_jax import sharding
  from w2s_jax.defenses import DEFENSES
  config = command.CONFIG.value
  if _REMAT.value:
    config.student.remat = _REMAT.value
  trained = [name for name, defense in DEFENSES.items() if defense.recipe]
  if unknown := set(_STEP.value) - {"defend", "poison", "evaluate", *trained}:
    raise InputError(f"--step={','.join(sorted(unknown))}: want names among defend, poison, evaluate, "
                     f"{', '.join(trained)}")
  if _SEARCH.value and (_MESH.value or _REMAT.value):
    raise InputError("--search tries meshes and remat policies itself: leave out --mesh and --remat")
  if len(config.defend.seeds) > 1:
    raise InputError(f"defend.seeds {tuple(config.defend.seeds)}: a plan covers one seed: leave the field empty")
  devices, tpu = devices_of(_TOPOLOGY.value)
  if _SEARCH.value:
    plans = search(_STEP.value[0], config, devices, *_shape(config, _STEP.value[0]), _TOPOLOGY.value, tpu)[:1]
    if not plans or not plans[0]["fits"]:
      raise InputError(f"no plan that was tried fits {_TOPOLOGY.value}: give a larger --topology, a smaller --batch or "
                       "--length, or --config.lora.quantize=int8")
  else:
    sizes = _MESH.value.split(",") if _MESH.value else [config.mesh[axis] for axis in sharding.AXES]
    if len(sizes) != 3 or not all(re.fullmatch(r"-?\d+", str(size)) for size in sizes):
      raise InputError(f"--mesh={_MESH.value}: want three numbers, DATA,FSDP,TENSOR")
    mesh = sharding.make_mesh(*map(int, sizes), devices=devices)
    names, plans = [name for name in _STEP.value if name != "poison" or "poison" in config], []
    for name in names:
      print(f"compiling {name}, {len(plans) + 1} of {len(names)} (a large model takes minutes)", file=sys.stderr)
      plans.append(plan_step(name, config, mesh, *_shape(config, name), _TOPOLOGY.value, tpu))
      if not _JSON.value:
        command.print_text(text(plans[-1]))
  if _JSON.value:
    command.print_text(json.dumps(plans[0] | {"steps": plans}))
  else:
    command.print_text((text(plans[0]) + "\n" if _SEARCH.value else "") + "train on this mesh with " + " ".join(
        f"--config.mesh.{axis}={size}" for axis, size in plans[0]["mesh"].items()))


if __name__ == "__main__":
  command.run(main, __doc__)
