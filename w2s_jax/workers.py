"""Runs several tasks at the same time on one machine, each in its own process."""

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging

from w2s_jax import InputError, processes

CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")    # JAX options of a new process


def show_log() -> None:
  """Sends the program's log to stdout, one line per message."""
  log = logging.getLogger("w2s_jax")
  log.setLevel(logging.INFO)
  log.propagate = False
  log.handlers = [logging.StreamHandler(sys.stdout)]


def outcomes(next_task: Callable, run: Callable, jobs: int) -> Iterator[tuple[str, Exception | None]]:
  """Yields (name, error or None) of each task when it has ended.

  With one job, tasks run in this process. With more, each task runs in its own process on an equal share of the CPU
  cores, and its output goes to WORKDIR/log.txt. SIGTERM is passed on to these processes, which save their finished
  steps. If this process is killed, they end at once.

  Args:
    next_task: (names of the running tasks) -> (name, config, workdir) of the task to start now; None: no task is left,
      or none can start before a running one ends.
    run: called with (config, workdir). It must be a module-level function, so that another process can import it. With
      one job, InputError and FloatingPointError are yielded as the task's error, and other exceptions are raised. With
      more jobs, every exception is yielded, as an InputError.
    jobs: number of tasks that run at the same time.
  Raises:
    Stopped: SIGTERM came, and `jobs` is above 1.
  """
  if jobs == 1:
    while task := next_task([]):
      name, *arguments = task
      yield name, _error_of(run, *arguments)
    return
  context, running = multiprocessing.get_context("spawn"), {}         # a fork of a process with threads may hang
  free = _shares(jobs)
  options = {name: getattr(jax.config, name) for name in CACHE}
  with _stopped_by_sigterm():
    try:
      while True:
        while free and (task := next_task([name for name, *_ in running.values()])):
          name, config, workdir = task
          receiver, sender = context.Pipe(duplex=False)
          process = context.Process(target=_child, args=(run, config, workdir, options, sender))
          cores = free.pop()
          with _on_cores(cores):                                       # the new process inherits them
            process.start()
          sender.close()                                               # so that the pipe closes when the process ends
          running[process.sentinel] = name, process, receiver, cores
        if not running:
          return
        for sentinel in multiprocessing.connection.wait(running):
          name, process, receiver, cores = running.pop(sentinel)
          process.join()
          free.append(cores)
          yield name, _outcome(process, receiver)
    finally:
      for _, process, *_ in running.values():
        process.terminate()
      for _, process, *_ in running.values():
        process.join()


def _error_of(run, config, workdir):
  try:
    run(config, workdir)
  except (FloatingPointError, InputError) as e:
    return e


def _shares(jobs):
  """[list of CPU cores] of the jobs. The lists are empty if the system cannot bind a process to cores."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  return [cores[i::jobs] or cores for i in range(jobs)]


@contextlib.contextmanager
def _on_cores(cores):
  if not cores:
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _stopped_by_sigterm():
  def stop(signum, frame):
    raise processes.Stopped("stopped by SIGTERM; the cells' finished steps are saved")
  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _outcome(process, receiver):
  """The error of a process that has ended; None if it had none."""
  with contextlib.suppress(EOFError):
    return InputError(receiver.recv())
  if process.exitcode:
    killed = process.exitcode == -signal.SIGKILL
    hint = ": killed, perhaps for want of memory (fewer --jobs need less)" if killed else ""
    return InputError(f"its process ended with exit code {process.exitcode}{hint}")
  return None


def _child(run: Callable, config: Any, workdir: Path, options: dict[str, Any], sender: Any) -> None:
  """The main function of a process. It does the run, writes the output to log.txt, and sends an error's message."""
  threading.Thread(target=_end_with_parent, daemon=True).start()
  absl_logging.set_verbosity(absl_logging.ERROR)
  for name, value in options.items():
    jax.config.update(name, value)
  workdir.mkdir(parents=True, exist_ok=True)
  with open(workdir / "log.txt", "a") as log:
    for stream in (sys.stdout, sys.stderr):
      os.dup2(log.fileno(), stream.fileno())                  # XLA bypasses Python's streams
  show_log()
  try:
    run(config, workdir)
  except processes.Stopped:
    sys.exit(processes.STOPPED_CODE)
  except Exception as e:
    traceback.print_exc()
    sender.send(str(e) if isinstance(e, (InputError, FloatingPointError)) else f"{type(e).__name__}: {e}")
    sys.exit(1)


def _end_with_parent():
  """Ends this process when its parent has ended. Otherwise it and a restarted command would use the same workdir."""
  multiprocessing.parent_process().join()
  os._exit(1)
