"""plan: memory, FLOPs and collectives of steps that are compiled, not run."""

import dataclasses
import json
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from cli import ENV, ROOT
from jax.sharding import PartitionSpec as P

from w2s_jax import InputError, plan, sharding
from w2s_jax.models import Model
from w2s_jax.planning import abstract, hlo

TEXT = """HloModule jit_f

%cond.1 (p: (s32[], f32[4,8])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(12)
  %get-tuple-element.7 = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%inner_body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(%x), channel_id=3, to_apply=%add
}

%piece (p: bf16[2,8]) -> bf16[16,8] {
  %all-gather.2 = bf16[16,8]{1,0:T(8,128)} all-gather(%p), channel_id=4, dimensions={0}
}

%body.1 (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %while.2 = (s32[], f32[4,8]) while(%t), condition=%c, body=%inner_body, backend_config={"known_trip_count":{"n":"5"}}
  %fusion.1 = bf16[16,8] fusion(%p), kind=kOutput, calls=%piece
  %fusion.2 = bf16[16,8] fusion(%p), kind=kOutput, calls=%piece
  %constant.2 = u32[]{:T(128)} constant(2)
  %add.3 = u32[]{:T(128)} add(%get-tuple-element.8, %constant.2), metadata={op_name="jit(f)/add"}
  ROOT %tuple.4 = (f32[4,8], /*index=1*/u32[]) tuple(%fusion.2, /*index=1*/%add.3)
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %all-gather-start.1 = (s8[100]{0}, s8[800]{0}) all-gather-start(%p), channel_id=1, dimensions={0}
  %while.1 = (s32[], f32[4,8]) while(%t), condition=%cond.1, body=%body.1
  %all-reduce.9 = (f32[10]{0}, /*index=1*/bf16[3,2]{1,0}) all-reduce(%a, %b), channel_id=9, to_apply=%add
  ROOT %r = f32[4,8] get-tuple-element(%while.1), index=1
}
"""


def test_collectives_of_a_program_by_hand():
  """Of two nested loops one has a noted trip count, one counts to 12 by twos. A split collective counts once."""
  found = hlo.collectives(TEXT)
  assert sorted(found) == [("all-gather", 256, 6, True), ("all-gather", 800, 1, False), ("all-reduce", 52, 1, False),
                           ("all-reduce", 128, 30, True)]
  assert hlo.totals(found) == {"all-gather": {"count": 7, "bytes": 6 * 256 + 800},
                               "all-reduce": {"count": 31, "bytes": 30 * 128 + 52}}


def test_collectives_of_a_compiled_loop():
  """Seven iterations, each with a sum of [3, 5] float32 over eight devices."""
  mesh = sharding.make_mesh(8, 1, 1, devices=jax.devices()[:8])
  def f(x):
    def turn(carry, _):
      return carry + jax.lax.psum(x[0] * carry, "data"), None
    return jax.lax.scan(turn, jnp.ones((3, 5)), length=7)[0]
  over = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
  text = jax.jit(over).lower(jnp.ones((8, 3, 5))).compile().as_text()
  assert hlo.totals(hlo.collectives(text)) == {"all-reduce": {"count": 7, "bytes": 7 * 60}}


@pytest.fixture(scope="module")
def config():
  c = runpy.run_path(str(ROOT / "configs/llama_badnet.py"))["get_config"]()
  c.student.arch.num_hidden_layers = 5
  return c


@pytest.mark.parametrize("name", ["defend", "evaluate", pytest.param("poison", marks=pytest.mark.slow)])
def test_a_plan_is_the_compilers(name, config):
  """Memory is the compiler's. FLOPs, extrapolated from one and two layers, are those of five unrolled layers."""
  mesh = sharding.make_mesh(2, 2, 2, devices=jax.devices()[:8])
  one = plan.plan_step(name, config, mesh, 16, 32, "v5e:2x4", tpu=False)
  memory = abstract.lower(name, config, mesh, 16, 32).compile().memory_analysis()
  per_chip = one["per_chip"]
  assert per_chip["arguments"] == memory.argument_size_in_bytes and per_chip["temporaries"] == memory.temp_size_in_bytes
  assert per_chip["total"] == per_chip["arguments"] + per_chip["temporaries"] + per_chip["output"]
  assert one["fits"] and per_chip["hbm"] == 16 * 2**30 and one["chips"] == 8
  model = abstract.student(config)
  unrolled = abstract.lower(name, config, mesh, 16, 32, Model(dataclasses.replace(model.config, unroll=True)))
  assert one["flops"] == pytest.approx(unrolled.compile().cost_analysis()["flops"], rel=0.02)
  assert one["step_seconds_estimate"] == max(one["seconds"].values()) >= one["flops"] / 197e12
  assert one["collectives"]["all-gather"]["count"] >= 5 * 7     # seven kernels of each layer over fsdp


def test_more_memory_than_a_chip_has_does_not_fit(config):
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  assert not plan.plan_step("evaluate", config, mesh, 2**17, 512, "v5e:1x1", tpu=False)["fits"]


@pytest.mark.slow
def test_a_search_puts_what_fits_and_is_quick_first(config):
  plans = plan.search("evaluate", config, jax.devices()[:2], 8, 16, "v5e:1x2", False)
  assert len({(p["batch"], *p["mesh"].values()) for p in plans}) == len(plans) >= 6
  rates = [p["batch"] / p["step_seconds_estimate"] for p in plans]
  assert rates == sorted(rates, reverse=True) and all(p["fits"] for p in plans)


@pytest.mark.parametrize("text", ["v5e", "v9:2x2", "v5e:2by2", "v5e:"])
def test_a_topology_that_is_none_is_refused(text):
  with pytest.raises(InputError, match="want CHIP:SHAPE with CHIP among v4, v5e, v5p, v6e"):
    plan.parse_topology(text)


def test_gpus_are_planned_by_a_cpu_compiler_that_keeps_bfloat16(monkeypatch):
  """On GPUs the usable memory is the fraction that JAX allocates at its start."""
  monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
  with pytest.raises(InputError, match="topology 'h100:2': this jax .* compiles bfloat16 as float32"):
    plan.devices_of("h100:2")
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
  assert plan.devices_of("h100:2") == (jax.devices()[:2], False)
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
  assert plan.usable("h200") == 0.75 * 140.4 * 2**30
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
  assert plan.usable("h200") == 0.9 * 140.4 * 2**30 and plan.usable("v5e") == 0.984 * 16 * 2**30


def run(*args, devices=8):
  return subprocess.run([sys.executable, "-m", "w2s_jax.plan", *args], cwd=ROOT, capture_output=True, text=True,
                        env=ENV | {"JAX_NUM_CPU_DEVICES": str(devices)})


@pytest.mark.skipif(plan.tpu_compiler(), reason="a TPU compiler is here: this is about where there is none")
def test_the_command_without_a_tpu_compiler():
  out = run("--config=configs/llama_badnet.py", "--topology=v5e:2x4", "--mesh=2,-1,2", "--step=defend,evaluate",
            "--json")
  assert out.returncode == 0, out.stderr
  got = json.loads(out.stdout)
  assert got["topology"] == "v5e:2x4" and got["chips"] == 8 and got["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
  assert got["fits"] is True and set(got["per_chip"]) == {"arguments", "temporaries", "output", "total", "hbm"}
  assert got["flops"] > 0 and got["step_seconds_estimate"] > 0 and got["compiler"] == "cpu"
  assert [step["step"] for step in got["steps"]] == ["defend", "evaluate"]
  assert "no TPU compiler here (pip install 'jax[tpu]')" in out.stderr


@pytest.mark.parametrize("message,args", [
    ("topology 'v9:1': want CHIP:SHAPE", ["--topology=v9:1"]),
    ("--mesh=2,2: want three numbers", ["--mesh=2,2"]),
    ("mesh data=3, fsdp=1, tensor=1 does not fit 4 device(s)", ["--mesh=3,1,1"]),
    ("batch of 31 rows cannot be split over data x fsdp = 4 devices: set --batch", ["--batch=31"]),
    ("--step=pioson: want names among defend, poison, evaluate", ["--step=pioson"]),
    ("remat 'half': want", ["--remat=half"]),
    ("--search tries meshes and remat policies itself", ["--search", "--mesh=1,4,1"]),
    ("adapter lora: no layer has nope: want targets among", ["--search", "--config.lora.targets=('nope',)"]),
    ("a plan covers one seed", ["--config.defend.seeds=(0,1)"]),
    ("lora.quantize 'int3': want", ["--config.lora.quantize=int3"]),
    ("config has no field 'lora.rnk': did you mean lora.rank", ["--config.lora.rnk=3"])])
def test_a_mistake_is_one_line_and_exit_code_2(message, args):
  out = run("--config=configs/llama_badnet.py", "--topology=v5e:2x2", *args)
  lines = [line for line in out.stderr.splitlines() if line.startswith("error: ")]
  assert out.returncode == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in out.stderr, out.stderr
