"""Tasks in processes of their own: which run at the same time, what becomes of errors, kills and SIGTERM."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from cli import ENV, ROOT, wait_until

from w2s_jax import InputError, processes, workers


def act(name, workdir):
  """The task. The worker processes import it."""
  print(f"this is {name}")
  logging.getLogger("w2s_jax.task").info("it begins")
  if name == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
  if name == "diverged":
    raise FloatingPointError("the loss is not finite")
  if name == "broken":
    raise KeyError("epochs")
  if name in ("first", "second"):                     # each ends only if the other is running
    (workdir / "began").touch()
    deadline = time.monotonic() + 100
    while not (workdir.parent / {"first": "second", "second": "first"}[name] / "began").exists():
      assert time.monotonic() < deadline
      time.sleep(0.01)


def until_stopped(name, workdir):
  """Runs until SIGTERM, and saves then."""
  def save(signum, frame):
    (workdir / "saved").touch()
    raise processes.Stopped("saved")
  signal.signal(signal.SIGTERM, save)
  (workdir / "began").touch()
  time.sleep(100)


def errors(names, directory, jobs):
  """({name: error}, names in the order in which they ended)."""
  waiting = [(name, name, directory / name) for name in names]
  return dict(workers.outcomes(lambda running: waiting.pop(0) if waiting else None, act, jobs))


def test_tasks_run_together_and_an_error_costs_no_other_task(tmp_path):
  found = errors(["first", "second", "killed", "diverged", "broken"], tmp_path, 2)
  assert found["first"] is found["second"] is None and len(found) == 5
  assert all(isinstance(found[name], InputError) for name in ("killed", "diverged", "broken"))
  assert "exit code -9" in str(found["killed"]) and str(found["broken"]) == "KeyError: 'epochs'"
  assert str(found["diverged"]) == "the loss is not finite"
  log = (tmp_path / "broken/log.txt").read_text()
  assert log.startswith("this is broken\nit begins\nTraceback") and "in act" in log


def test_with_one_job_tasks_run_here_and_only_mistakes_are_outcomes(tmp_path, capsys):
  found = errors(["plain", "diverged"], tmp_path, 1)
  assert found["plain"] is None and isinstance(found["diverged"], FloatingPointError)
  assert "this is plain" in capsys.readouterr().out
  with pytest.raises(KeyError):
    errors(["broken"], tmp_path, 1)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot bind processes to cores")
def test_each_job_has_its_share_of_the_cores(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 6})
  assert workers._shares(2) == [[0, 2, 6], [1, 3]] and workers._shares(6)[5] == [0, 1, 2, 3, 6]


def test_sigterm_reaches_the_tasks_which_save(tmp_path):
  script = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import test_workers
from w2s_jax import processes, workers
if __name__ == "__main__":
  waiting = [(name, name, pathlib.Path({str(tmp_path)!r}) / name) for name in "ab"]
  try:
    list(workers.outcomes(lambda running: waiting.pop(0) if waiting else None, test_workers.until_stopped, 2))
  except processes.Stopped:
    sys.exit(processes.STOPPED_CODE)
"""
  (tmp_path / "script.py").write_text(script)
  process = subprocess.Popen([sys.executable, tmp_path / "script.py"], env=ENV | {"PYTHONPATH": str(ROOT)})
  wait_until(lambda: all((tmp_path / name / "began").exists() for name in "ab"), process, seconds=200)
  process.terminate()
  assert process.wait(60) == processes.STOPPED_CODE
  assert all((tmp_path / name / "saved").exists() for name in "ab")
