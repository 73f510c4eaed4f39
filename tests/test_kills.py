"""After SIGKILL at a random moment, or a full disk, a resumed run ends as an uninterrupted run does.

W2S_KILLS=100 pytest -m slow tests/test_kills.py kills a hundred times.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from cli import CONFIG, ENV, ROOT, SHORT, before_the_defenses, w2s, wait_until

KILLS = int(os.environ.get("W2S_KILLS", 2))
FLAGS = (CONFIG, *(f for f in SHORT if "defend.max_steps" not in f))
# Sixty steps, each with a checkpoint, so at most moments one is being written.
DEFEND = (*FLAGS, "--stage=defend", "--config.defenses=('w2s_adv',)", "--config.defend.epochs=30",
          "--config.checkpoint_every=1", "--config.lora.dropout=0.1")


def outcome(workdir):
  """{file: its hash} of what the stage leaves: the model and the metrics."""
  files = [*(workdir / "models/w2s_adv").iterdir(), workdir / "metrics/w2s_adv.jsonl"]
  return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def start(workdir):
  """Starts the stage, and returns its process once it trains or has ended."""
  process = subprocess.Popen([sys.executable, "-m", "w2s_jax.main", *DEFEND, f"--workdir={workdir}"], cwd=ROOT, env=ENV,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  wait_until(lambda: (workdir / "metrics/w2s_adv.jsonl").exists() or process.poll() is not None)
  return process


@pytest.mark.slow
def test_killed_and_resumed_is_never_killed(tiny_run, tmp_path):
  whole = before_the_defenses(tiny_run, tmp_path / "whole")
  assert w2s(*DEFEND, f"--workdir={whole}").returncode == 0        # compiles; the next run is timed
  timed = before_the_defenses(tiny_run, tmp_path / "timed")
  process, began = start(timed), time.monotonic()
  assert process.wait(300) == 0
  seconds, want = time.monotonic() - began, outcome(whole)
  assert outcome(timed) == want
  def kill(number):
    """Kills and resumes a run. Returns the number of steps before the kill; None if the run had ended."""
    workdir = before_the_defenses(tiny_run, tmp_path / f"killed{number}")
    process = start(workdir)
    time.sleep(random.Random(number).uniform(0, seconds))
    process.send_signal(signal.SIGKILL)
    killed = process.wait(60) == -signal.SIGKILL
    done = len((workdir / "metrics/w2s_adv.jsonl").read_text().splitlines())
    again = w2s(*DEFEND, f"--workdir={workdir}")
    assert again.returncode == 0, f"kill {number} after {done} steps: {again.stderr[-2000:]}"
    assert outcome(workdir) == want, f"kill {number} after {done} steps"
    return done if killed else None
  with ThreadPoolExecutor(2) as pool:
    steps = list(pool.map(kill, range(KILLS)))
  print(f"killed after so many steps of 60 (None: had ended): {steps}")
  assert any(steps) and sum(done is None for done in steps) <= KILLS // 4


def grid_process(workdir):
  flags = ("--config=configs/grid_offline.py:attacks=badnet+suffix,seeds=2", "--config.defenses=none,lora_ce",
           "--jobs=2", f"--workdir={workdir}", *SHORT)
  return subprocess.Popen([sys.executable, "-m", "w2s_jax.main", *flags], cwd=ROOT, env=ENV, start_new_session=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def grid_tables(workdir):
  return [(workdir / name).read_text() for name in ("rows.jsonl", "results.md", "rows.csv", "table.tex", "report.html")]


@pytest.mark.slow
def test_a_grid_that_is_killed_again_and_again_ends_with_the_same_tables(tmp_path):
  """One grid, killed at W2S_KILLS random moments: its cells end with it, and no complete cell runs again."""
  began = time.monotonic()
  assert grid_process(tmp_path / "whole").wait(900) == 0
  seconds, workdir, kills, moments = time.monotonic() - began, tmp_path / "killed", 0, random.Random(0)
  written, seen = {}, 0
  while kills < KILLS:
    process = grid_process(workdir)
    try:
      process.wait(moments.uniform(0, seconds))
      assert process.returncode == 0
      shutil.rmtree(workdir)                          # it ended before the kill; start again
      written = {}
      continue
    except subprocess.TimeoutExpired:
      process.kill()                                  # the command alone, not the processes of its cells
    process.wait()
    kills += 1
    wait_until(lambda: not alive(process.pid), seconds=60)         # a cell ends with its parent
    now = times_of_complete_cells(workdir)
    assert written.items() <= now.items(), "a complete cell ran again"
    written, seen = now, max(seen, len(now))
  assert grid_process(workdir).wait(900) == 0
  assert written.items() <= times_of_complete_cells(workdir).items()
  assert grid_tables(workdir) == grid_tables(tmp_path / "whole")
  print(f"{kills} kills; at most {seen} of 4 cells were complete at one of them")


def times_of_complete_cells(workdir):
  """{cell: when its results were written} of the cells in the store."""
  store = workdir / "rows.jsonl"
  names = {json.loads(line)["cell"] for line in store.read_text().splitlines()} if store.exists() else ()
  return {name: (workdir / "cells" / name / "results.json").stat().st_mtime_ns for name in names}


def alive(session):
  """Whether a process of the session is left."""
  return subprocess.run(["pgrep", "--session", str(session)], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.slow
def test_no_room_is_one_line_and_the_same_command_finishes_later(tiny_run, tmp_path):
  """A limit on the size of files acts as a full disk. Without it the same command ends as an uninterrupted run."""
  whole, small = (before_the_defenses(tiny_run, tmp_path / name) for name in ("whole", "small"))
  command = [sys.executable, "-m", "w2s_jax.main", *DEFEND, f"--workdir={small}"]
  weights = (small / "models/poisoned/model.safetensors").stat().st_size
  for share in (0.01, 0.9):                          # fails in the first checkpoint, then in the model at the end
    limit = int(share * weights)
    out = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=600,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert out.returncode == 2, out.stderr
    assert out.stderr.splitlines()[-1].startswith("error: cannot write any more (File too large): make room")
    assert "Traceback" not in out.stderr and not (small / "models/w2s_adv").exists()
  assert w2s(*DEFEND, f"--workdir={small}").returncode == w2s(*DEFEND, f"--workdir={whole}").returncode == 0
  assert outcome(small) == outcome(whole)


def test_ctrl_c_while_jax_is_imported_is_one_line(tmp_path):
  """A module `jax` that raises SIGINT stands for the real one, which takes seconds to import."""
  (tmp_path / "jax").mkdir()
  (tmp_path / "jax/__init__.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)")
  out = subprocess.run([sys.executable, "-m", "w2s_jax.main", CONFIG, f"--workdir={tmp_path / 'w'}"], cwd=ROOT,
                       env=ENV | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
                       preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # background jobs ignore it
  assert (out.returncode, out.stderr.strip().count("\n")) == (130, 0), out.stderr
  assert "interrupted: run the same command again to continue from the last checkpoint" in out.stderr
