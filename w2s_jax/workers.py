"""Several runs at the same time on one machine, each in a process of its own."""

import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax

from w2s_jax import InputError

CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")    # options of JAX


@contextlib.contextmanager
def start(jobs: int) -> Iterator[Callable[..., concurrent.futures.Future]]:
  """Yields submit(run, config, workdir) -> Future of what run(config, workdir) returns.

  With one job, `submit` itself runs it, in this process. With more, each of `jobs` processes has an equal share of the
  CPU cores, its output goes to WORKDIR/log.txt, and it ends if this process is killed.

  Raises:
    InputError: one of the processes was killed.
  """
  if jobs == 1:
    yield _run_here
    return
  context = multiprocessing.get_context("spawn")        # a fork of a process with JAX's threads may hang
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  shares = context.SimpleQueue()
  for i in range(jobs):
    shares.put(cores[i::jobs] or cores)
  options = {name: getattr(jax.config, name) for name in CACHE}
  try:
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _begin, (shares, options)) as pool:
      yield lambda run, config, workdir: pool.submit(_logged, run, config, workdir)
  except BrokenProcessPool as e:
    raise InputError("a cell's process was killed (out of memory?): lower --jobs, and run the command again") from e


def _run_here(run, config, workdir):
  future = concurrent.futures.Future()
  try:
    future.set_result(run(config, workdir))
  except (FloatingPointError, InputError) as e:
    future.set_exception(e)
  return future


def _begin(shares, options):
  """The first thing that a new process does."""
  if cores := shares.get():
    os.sched_setaffinity(0, cores)
  for name, value in options.items():
    jax.config.update(name, value)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
  """Two processes would write to one workdir if the first went on after the command was killed and started again."""
  multiprocessing.parent_process().join()
  os._exit(1)


def _logged(run: Callable, config: Any, workdir: Path) -> Any:
  workdir.mkdir(parents=True, exist_ok=True)
  with (open(workdir / "log.txt", "a", buffering=1) as log, contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log)):
    logger = logging.getLogger("w2s_jax")
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler(log)]
    return run(config, workdir)
