"""One program in several processes: which process writes, what they share, and when they stop.

Every process runs every line. Only process 0 writes files, but all of them write Orbax checkpoints. All must see the
same workdir.
"""

import contextlib
import functools
import itertools
import json
import os
import shutil
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
LOST_CODE = 75               # exit code after the loss of another process (EX_TEMPFAIL); all must be started again
HEARTBEAT_SECONDS = 20       # a process that is silent for this time counts as dead, and the others stop


_questions = itertools.count(1)   # numbers the calls of stop() in this process, across all stages, as JAX requires


class Stopped(Exception):
  """SIGTERM came, and the finished steps are saved."""


def connect(coordinator_address: str | None = None, num_processes: int | None = None,
            process_id: int | None = None) -> None:
  """Joins the other processes. Without arguments JAX finds them (TPU pods, SLURM, Kubernetes, MPI).

  coordinator_address: HOST:PORT of process 0.
  """
  jax.distributed.initialize(coordinator_address, num_processes, process_id,
                             heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=HEARTBEAT_SECONDS)


def writes() -> bool:
  """Whether this process writes files."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Barrier: returns once every process has called it with this name. Then all see what process 0 wrote before."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def check_shared(workdir: Path) -> None:
  """Checks that all processes see the workdir as one directory under one name; every process must call it.

  Raises:
    InputError: they do not. Every process raises it. Without the check a process might wait forever for a file.
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
  if other := [i for i, (exists, path_hash) in enumerate(seen) if not exists or path_hash != seen[0][1]]:
    raise InputError(f"{workdir} is not the same directory in process {', '.join(map(str, other))} as in process 0: "
                     "give a --workdir that all of them see under one name (a shared file system)")


def first_says(value: bool) -> bool:
  """Returns process 0's `value` in every process."""
  return bool(multihost_utils.broadcast_one_to_all(np.array(value))) if jax.process_count() > 1 else value


def write_text(path: Path, text: str) -> None:
  """Process 0 writes the file, whole or not at all; every process must call this function.

  A process can rely on the old file until it calls this function, and on the new file once the function has returned.
  """
  wait(f"before {path}")
  if writes():
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
  wait(f"after {path}")


def copy_whole(source: Path, target: Path) -> None:
  """Copies a directory, whole or not at all, in the process that calls this function."""
  part = target.with_name(f"{target.name}.part")
  shutil.rmtree(part, ignore_errors=True)
  shutil.copytree(source, part)
  os.replace(part, target)


def write_json(path: Path, value: Any) -> None:
  write_text(path, json.dumps(value, indent=2))


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
  """Returns the whole array in every process, whichever devices hold its shards. All processes must call it."""
  if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
    array = _gather(NamedSharding(array.sharding.mesh, P()))(array)
  return np.asarray(array)


@functools.lru_cache
def _gather(everywhere):
  return jax.jit(lambda x: x, out_shardings=everywhere)


def share_work(make: Callable[[Sequence], dict[str, np.ndarray]], items: Sequence) -> dict[str, np.ndarray]:
  """The result of make(items) in every process. Each process computes its share of the rows.

  make: function from items to {name: array [N, ...]}, with one row per item.
  items: N >= 1 items.
  """
  count = jax.process_count()
  if count == 1:
    return make(items)
  share = [items[min(i, len(items) - 1)] for i in range(jax.process_index(), -(-len(items) // count) * count, count)]
  gathered = multihost_utils.process_allgather(make(share))                # each [processes, N / processes, ...]
  return {k: np.swapaxes(v, 0, 1).reshape(-1, *v.shape[2:])[:len(items)] for k, v in gathered.items()}


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
  """Yields stop(), which returns whether SIGTERM has come to this process or to any other process of the program.

  With several processes, the n-th call returns the same value in all of them, so all must call stop() equally often.
  After the signal a few calls still return False.
  """
  if jax.process_count() > 1:                       # JAX's own handler tells the other processes
    yield lambda: multihost_utils.reached_preemption_sync_point(next(_questions))
    return
  received = []
  before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
  try:
    yield lambda: bool(received)
  finally:
    signal.signal(signal.SIGTERM, before)
