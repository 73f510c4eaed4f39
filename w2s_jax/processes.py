"""One program in several processes: who writes, what all must know, and when to stop.

Every process runs every line; process 0 alone writes files that are not Orbax's. The workdir lies where all see it.
"""

import contextlib
import functools
import itertools
import json
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from w2s_jax import InputError

STOPPED_CODE = 143           # exit code after SIGTERM: 128 + 15, as shells have it
LOST_CODE = 75               # where another process was lost (EX_TEMPFAIL): to be started again
HEARTBEAT_SECONDS = 20       # a process that is silent for so long is dead, and the others stop


_questions = itertools.count(1)   # of `stop_signal`, in this process: JAX wants them numbered, over all stages


class Stopped(Exception):
  """SIGTERM came, and all that was done is saved."""


def connect(coordinator_address: str | None = None, num_processes: int | None = None,
            process_id: int | None = None) -> None:
  """Joins the other processes; without arguments they are found (TPU pods, SLURM, Kubernetes)."""
  jax.distributed.initialize(coordinator_address, num_processes, process_id,
                             heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=HEARTBEAT_SECONDS)


def writes() -> bool:
  """Whether this process writes files."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Until every process has come here: what process 0 wrote before is there for all of them after."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def check_shared(workdir: Path) -> None:
  """Every process comes here: is the workdir one directory, which all of them see under one name?

  Raises:
    InputError: in every process, where it is not: they would wait for each other's files for ever.
  """
  if jax.process_count() == 1:
    return
  token = multihost_utils.broadcast_one_to_all(np.array(time.time_ns() % 2**31, np.int32))
  file = workdir / f".seen-{int(token)}"
  if writes():
    file.touch()
  wait("the workdir's first file")
  name = zlib.crc32(str(workdir.absolute()).encode()) % 2**31
  seen = multihost_utils.process_allgather(np.array([file.exists(), name], np.int32))
  if writes():
    file.unlink()
  if other := [i for i, (there, theirs) in enumerate(seen) if not there or theirs != seen[0][1]]:
    raise InputError(f"{workdir} is not the same directory in process {', '.join(map(str, other))} as in process 0: "
                     "give a --workdir that all of them see under one name (a shared file system)")


def first_says(value: bool) -> bool:
  """Process 0's `value`, in every process."""
  return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value


def write_text(path: Path, text: str) -> None:
  """The file appears whole or not at all; every process comes here, and process 0 writes once all have.

  So what was there before is the same for all until then, and what is there after for all.
  """
  wait(f"before {path}")
  if writes():
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
  wait(f"after {path}")


def write_json(path: Path, value: Any) -> None:
  write_text(path, json.dumps(value, indent=2))


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
  """The whole array, in every process, whichever devices its parts lie on; all processes must ask."""
  if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
    array = _gather(NamedSharding(array.sharding.mesh, P()))(array)
  return np.asarray(array)


@functools.lru_cache
def _gather(everywhere):
  return jax.jit(lambda x: x, out_shardings=everywhere)


def shared(make: Callable[[Sequence], dict[str, np.ndarray]], items: Sequence) -> dict[str, np.ndarray]:
  """make(items), of which each process makes its share: arrays [N, ...] with a row for each of N >= 1 items."""
  count = jax.process_count()
  if count == 1:
    return make(items)
  mine = [items[min(i, len(items) - 1)] for i in range(jax.process_index(), -(-len(items) // count) * count, count)]
  made = multihost_utils.process_allgather(make(mine))                # [processes, N / processes, ...] each
  return {k: np.swapaxes(v, 0, 1).reshape(-1, *v.shape[2:])[:len(items)] for k, v in made.items()}


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
  """Gives stop() -> whether SIGTERM has come: to this process, or where there are several, to any of them.

  Several processes get True at the same question, some questions after the signal: all must ask equally often.
  """
  if jax.process_count() > 1:                       # JAX's own handler tells the others
    yield lambda: multihost_utils.reached_preemption_sync_point(next(_questions))
    return
  received = []
  before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
  try:
    yield lambda: bool(received)
  finally:
    signal.signal(signal.SIGTERM, before)
