"""One program in several processes: who writes, what all must know, and when to stop.

Every process runs every line; process 0 alone writes files that are not Orbax's. The workdir lies where all see it.
"""

import contextlib
import signal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

STOPPED_CODE = 143           # exit code after SIGTERM: 128 + 15, as shells have it
HEARTBEAT_SECONDS = 20       # a process that is silent for so long is dead, and the others stop


class Stopped(Exception):
  """SIGTERM came, and all that was done is saved."""


def connect(coordinator_address=None, num_processes=None, process_id=None):
  """Joins the other processes; without arguments they are found (TPU pods, SLURM, Kubernetes)."""
  jax.distributed.initialize(coordinator_address, num_processes, process_id,
                             heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=HEARTBEAT_SECONDS)


def writes():
  """Whether this process writes files."""
  return jax.process_index() == 0


def wait(name):
  """Until every process has come here: what process 0 wrote before is there for all of them after."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def writing(path):
  """Gives whether this process writes `path`, once all have seen what was there; then waits until it is there."""
  wait(f"before {path}")
  yield writes()
  wait(f"after {path}")


def fetch(array):
  """The whole array as numpy, in every process, whichever devices its parts lie on; all processes must ask."""
  if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
    everywhere = NamedSharding(array.sharding.mesh, P())
    array = jax.jit(lambda x: x, out_shardings=everywhere)(array)
  return np.asarray(array)


@contextlib.contextmanager
def stop_signal():
  """Gives stop(step) -> whether SIGTERM has come: to this process, or where there are several, to any of them.

  Several processes get True at the same step, some steps after the signal: each must ask after each of its steps.
  """
  if jax.process_count() > 1:                       # JAX's own handler tells the others
    yield multihost_utils.reached_preemption_sync_point
    return
  received = []
  before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
  try:
    yield lambda step: bool(received)
  finally:
    signal.signal(signal.SIGTERM, before)
