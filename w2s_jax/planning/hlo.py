"""Reads the collectives out of a compiled program's text: kind, bytes, and number of executions."""

import math
import re
from collections.abc import Iterable

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16}                              # the first number in any other dtype's name is its bits
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
CALLED = re.compile(r"(?:body|calls|to_apply|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
BODY = re.compile(r"body=%?([\w.\-]+)")
CONSTANT = re.compile(r"= [su]32\[\]\S* constant\(([1-9]\d*)\)")
ELEMENT = re.compile(r"= [su]32\[\]\S* get-tuple-element\(.*?\), index=(\d+)")
NAME = re.compile(r" *(?:ROOT )?(%[\w.\-]+) =")
OPERANDS = re.compile(r"%[\w.\-]+")
CHANNEL = re.compile(r"channel_id=\d+")
INSTRUCTION = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(r"(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]")


def collectives(text: str) -> list[tuple[str, int, int, bool]]:
  """[(kind, bytes, times, in_loop)] of every collective in the text of a compiled module, on one device.

  bytes: size of the result; a combined collective has several results, whose sizes are added.
  times: number of executions, which is the product of the known trip counts of the loops around it.
  in_loop: whether the collective is in a loop.
  """
  computations, entry = _computations(text)
  out, channels = [], set()
  def walk(name, times, in_loop):
    for line in computations.get(name, ()):
      channel = CHANNEL.search(line)
      if (instruction := INSTRUCTION.search(line)) and (channel is None or channel[0] not in channels):
        channels.update([channel[0]] if channel else [])   # parts of a split collective share a channel
        out.append((instruction[2], _result_bytes(*instruction.groups()), times, in_loop))
      loop = " while(" in line
      trips = _trips(line, computations) if loop else 1
      called = CALLED.findall(line) + [name.strip(" %") for names in BRANCHES.findall(line)
                                       for name in names.split(",")]
      for inner in called:
        walk(inner, times * trips, in_loop or loop)
  walk(entry, 1, False)
  return out


def _trips(line, computations):
  """Trip count of a loop; 1 if it cannot be read.

  It is the compiler's note, or else the only constant in the loop's condition divided by the counter's increment. The
  increment of a partly unrolled loop is above 1.
  """
  if noted := TRIPS.search(line):
    return int(noted[1])
  condition = computations.get(CONDITION.search(line)[1], ())
  bounds = [int(matched[1]) for other in condition if (matched := CONSTANT.search(other))]
  counters = [int(matched[1]) for other in condition if (matched := ELEMENT.search(other))]
  if len(bounds) != 1:
    return 1
  increment = _added(computations.get(BODY.search(line)[1], ()), counters[0]) if len(counters) == 1 else 1
  return -(-bounds[0] // increment)


def _added(body, element):
  """The number that a loop's body adds to an element of its state per iteration; 1 if it cannot be read."""
  defined = {matched[1]: line for line in body if (matched := NAME.match(line))}
  root = next((line for line in body if line.strip().startswith("ROOT")), "")
  state = OPERANDS.findall(root.partition(" tuple(")[2].partition(")")[0])
  if element < len(state) and " add(" in (line := defined.get(state[element], "")):
    for name in OPERANDS.findall(line.partition(" add(")[2].partition(")")[0]):
      if matched := CONSTANT.search(defined.get(name, "")):
        return int(matched[1])
  return 1


def totals(found: Iterable[tuple[str, int, int, bool]]) -> dict[str, dict[str, int]]:
  """{kind: {"count", "bytes"}}: the result of `collectives`, summed over all executions."""
  out = {}
  for kind, size, times, _ in found:
    total = out.setdefault(kind, {"count": 0, "bytes": 0})
    total["count"] += times
    total["bytes"] += size * times
  return out


def _computations(text):
  """({name of a computation: its lines}, name of the entry computation)."""
  computations, entry, name = {}, None, None
  for line in text.splitlines():
    if not line.startswith(" ") and (head := COMPUTATION.match(line)):
      name = head[1]
      computations[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif name is not None:
      computations[name].append(line)
  return computations, entry


def _result_bytes(shape, kind, started):
  """Bytes of an instruction's results. The shape of a -start instruction, except all-reduce, also has the operands."""
  arrays = [array for array in ARRAY.findall(shape) if not started or array[1]]     # drops a -start's own scalars
  if started and kind != "all-reduce":
    arrays = arrays[len(arrays) // 2:]
  return sum(map(_bytes, arrays))


def _bytes(array):
  dtype, shape = array
  bits = BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
  return math.prod(int(n) for n in shape.split(",") if n) * bits // 8
