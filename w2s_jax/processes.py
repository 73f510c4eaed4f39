"""One program in several processes: which one writes, what they share, and when they stop.

Every process runs every line. Process 0 alone writes files, except Orbax's. All processes must see the workdir.
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
LOST_CODE = 75               # exit code after the loss of another process (EX_TEMPFAIL): start all of them again
HEARTBEAT_SECONDS = 20       # after this silence a process counts as dead, and the others stop


_questions = itertools.count(1)   # numbers this process's calls of stop() over all stages, as JAX requires


class Stopped(Exception):
  """SIGTERM came, and the finished steps are saved."""


def connect(coordinator_address: str | None = None, num_processes: int | None = None,
            process_id: int | None = None) -> None:
  """Joins the other processes; without arguments JAX finds them (TPU pods, SLURM, Kubernetes)."""
  jax.distributed.initialize(coordinator_address, num_processes, process_id,
                             heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=HEARTBEAT_SECONDS)


def writes() -> bool:
  """Whether this process writes files."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Barrier: returns once every process has called it. All of them then see what process 0 wrote before it."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def check_shared(workdir: Path) -> None:
  """Checks that all processes see the workdir as one directory under one name; every process must call it.

  Raises:
    InputError: in every process, if they do not. They would wait for each other's files for ever.
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

  All processes see the old file until the second barrier, and the new one after it.
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
  """Returns the whole array to every process, whichever devices hold its shards; all processes must call it."""
  if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
    array = _gather(NamedSharding(array.sharding.mesh, P()))(array)
  return np.asarray(array)


@functools.lru_cache
def _gather(everywhere):
  return jax.jit(lambda x: x, out_shardings=everywhere)


def share_work(make: Callable[[Sequence], dict[str, np.ndarray]], items: Sequence) -> dict[str, np.ndarray]:
  """The result of make(items): arrays [N, ...], one row per item, N >= 1. Each process computes its share of the rows.
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

  With several processes, the n-th call returns the same in all of them. After the signal, a few calls still return
  False. So all processes must call it equally often.
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
