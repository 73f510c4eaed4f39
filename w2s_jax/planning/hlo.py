"""What a compiled program says of its collectives: kind, bytes, and how often they are run."""

import math
import re
from collections.abc import Iterable

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16}                                                # others end in their number of bits
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

  Bytes are those of the result, or of the results of several that go together; `times` counts the turns
  of the loops around it, where the compiler knows them; `in_loop` says whether there is one.
  """
  computations, entry = _computations(text)
  out, channels = [], set()
  def walk(name, times, in_loop):
    for line in computations.get(name, ()):
      channel = CHANNEL.search(line)
      if (found := INSTRUCTION.search(line)) and (channel is None or channel[0] not in channels):
        channels.update([channel[0]] if channel else [])   # the pieces of one that runs beside a fusion share theirs
        out.append((found[2], _result_bytes(*found.groups()), times, in_loop))
      loop = " while(" in line
      trips = _trips(line, computations) if loop else 1
      called = CALLED.findall(line) + [name.strip(" %") for some in BRANCHES.findall(line) for name in some.split(",")]
      for inner in called:
        walk(inner, times * trips, in_loop or loop)
  walk(entry, 1, False)
  return out


def _trips(line, computations):
  """Turns of a loop: what the compiler noted, or the one number that its condition compares with; 1 otherwise.

  A loop that was unrolled in part counts up by more than one.
  """
  if noted := TRIPS.search(line):
    return int(noted[1])
  condition = computations.get(CONDITION.search(line)[1], ())
  bounds = [int(found[1]) for other in condition if (found := CONSTANT.search(other))]
  counters = [int(found[1]) for other in condition if (found := ELEMENT.search(other))]
  if len(bounds) != 1:
    return 1
  by = _added(computations.get(BODY.search(line)[1], ()), counters[0]) if len(counters) == 1 else 1
  return -(-bounds[0] // by)


def _added(body, element):
  """What a loop's body adds to this element of its state in a turn; 1 where that cannot be read."""
  defined = {found[1]: line for line in body if (found := NAME.match(line))}
  root = next((line for line in body if line.strip().startswith("ROOT")), "")
  state = OPERANDS.findall(root.partition(" tuple(")[2].partition(")")[0])
  if element < len(state) and " add(" in (line := defined.get(state[element], "")):
    for name in OPERANDS.findall(line.partition(" add(")[2].partition(")")[0]):
      if found := CONSTANT.search(defined.get(name, "")):
        return int(found[1])
  return 1


def totals(found: Iterable[tuple[str, int, int, bool]]) -> dict[str, dict[str, int]]:
  """{kind: {"count", "bytes"}} of what `collectives` found, each as often as it is run."""
  out = {}
  for kind, size, times, _ in found:
    one = out.setdefault(kind, {"count": 0, "bytes": 0})
    one["count"] += times
    one["bytes"] += size * times
  return out


def _computations(text):
  """({name: lines}, name of the entry)."""
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
  """Of an instruction's shape: one that is awaited apart has its operands there too, but for an all-reduce."""
  arrays = [array for array in ARRAY.findall(shape) if not started or array[1]]     # it has scalars of its own, too
  if started and kind != "all-reduce":
    arrays = arrays[len(arrays) // 2:]
  return sum(map(_bytes, arrays))


def _bytes(array):
  dtype, shape = array
  bits = BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
  return math.prod(int(n) for n in shape.split(",") if n) * bits // 8
