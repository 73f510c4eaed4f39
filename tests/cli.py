"""Runs the program as a user does, but with few steps, and without LLVM's expensive passes (see conftest.py)."""

import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
ENV = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")} | {
    "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
# The environment of users: LLVM's expensive passes run, and compiled programs are cached beside the workdir.
AS_USERS = {k: v for k, v in ENV.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
CONFIG = "--config=configs/llama_badnet.py"
# Few steps in each stage, on few rows.
SHORT = ("--config.warmup.max_steps=3", *(f"--config.{stage}.max_steps=6" for stage in ("poison", "teach", "defend")),
         "--config.attack.poison_count=20", "--config.data.attack_rows.train=80", "--config.data.attack_rows.dev=20",
         "--config.data.defend_rows.train=64", "--config.data.defend_rows.dev=20", "--config.data.defend_rows.test=40",
         "--config.data.eval_batch_size=32", "--config.log_every=1")


def w2s(*args, cwd=ROOT, env=ENV, timeout=2400, **kwargs):
  """CompletedProcess of `python -m w2s_jax.main ARGS` from the repository's root."""
  return subprocess.run([sys.executable, "-m", "w2s_jax.main", *args], cwd=cwd, env=env, capture_output=True, text=True,
                        timeout=timeout, **kwargs)


def w2s_forked(*args):
  """Like `w2s`, but forked from a process that has imported everything. Short commands run faster this way."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["w2s_jax.stages", "transformers.models.auto.tokenization_auto"])
  with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
    process = context.Process(target=_main, args=(args, out.name, err.name))
    process.start()
    process.join(2400)
    process.kill()                                  # in case it has not ended
    process.join()
    return subprocess.CompletedProcess(args, process.exitcode, out.read(), err.read())


def _main(args, *streams):
  import datasets
  datasets.disable_progress_bars()                  # main sets a variable for this, but too late for a fork
  for fd, name in enumerate(streams, 1):
    os.dup2(os.open(name, os.O_WRONLY), fd)
  os.chdir(ROOT)
  sys.argv = ["w2s_jax.main", *args]
  runpy.run_module("w2s_jax.main", run_name="__main__", alter_sys=True)


def wait_until(ready, *processes, seconds=600, log=None):
  """Waits until ready() is true. Fails after `seconds` or when a process has ended, and then shows the file `log`."""
  deadline = time.monotonic() + seconds
  while not ready():
    assert time.monotonic() < deadline and all(process.poll() is None for process in processes), log and log.read_text()
    time.sleep(0.01)


def lines_of(file):
  """Number of lines in a file; 0 if it does not exist."""
  return file.read_text().count("\n") if file.exists() else 0


def before_the_defenses(workdir, new):
  """Copies the finished run `workdir` to `new` as it was before the defend stage. Returns `new`."""
  for stage in ("poisoned", "clean", "base", "teacher"):
    shutil.copytree(workdir / "models" / stage, new / "models" / stage)
  shutil.copytree(workdir / "data", new / "data")
  return new
