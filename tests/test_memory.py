"""The memory that loading and saving take beyond the arrays, measured by benchmarks/load.py. Linux only.

D width, F feed-forward width.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli import ENV, ROOT

from benchmarks import load

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

# (layers, vocabulary, D, F), and the most memory beyond the arrays, as a fraction of the checkpoint. Backend and
# compiler take about 60 MiB at any size, so the small checkpoint only shows that nothing is held twice.
SMALL = (6, 32768, 1024, 2816), 0.6
LARGE = (18, 128256, 2048, 5632), 0.1
DEVICES = {"plain": (1, ()), "one": (1, ("--mesh=-1,1,1",)), "eight": (8, ("--mesh=1,8,1", "--devices=8"))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """checkpoint(sizes) -> directory of load.make_checkpoint."""
  made = {}
  def make(sizes):
    if sizes not in made:
      made[sizes] = tmp_path_factory.mktemp("llama")
      load.make_checkpoint(made[sizes], *sizes)
    return made[sizes]
  yield make
  for directory in made.values():
    shutil.rmtree(directory)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("sizes,most", [pytest.param(*SMALL, id="small"),
                                        pytest.param(*LARGE, id="2GiB", marks=pytest.mark.slow)])
def test_loading_and_saving_take_little_above_the_arrays(sizes, most, devices, checkpoint, tmp_path):
  """Each device holds its shard of every matrix and of the new head, and a copy of all norms."""
  count, options = DEVICES[devices]
  out = subprocess.run([sys.executable, "benchmarks/load.py", "one", str(checkpoint(sizes)), *options,
                        f"--save={tmp_path / 'saved'}"], cwd=ROOT, env=ENV, capture_output=True, text=True)
  assert out.returncode == 0, out.stderr
  got = json.loads(out.stdout.splitlines()[-1])
  shapes = [shape for shard in load.tensor_shapes(*sizes) for shape in shard.values()]
  matrices = sum(2 * math.prod(shape) for shape in shapes if len(shape) == 2) + 4 * 2 * sizes[2]
  norms = sum(4 * math.prod(shape) for shape in shapes if len(shape) == 1)
  assert list(got["device_bytes"].values()) == [matrices // count + norms] * count
  assert got["array_bytes"] == matrices + count * norms
  assert got["checkpoint_bytes"] > {SMALL: 190, LARGE: 2048}[sizes, most] * 2**20
  assert got["overhead_bytes"] <= most * got["checkpoint_bytes"], got
  assert got["save_overhead_bytes"] <= most * got["checkpoint_bytes"], got
