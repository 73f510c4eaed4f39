"""What loading takes above the arrays themselves, by benchmarks/load_memory.py in a process of its own. Linux only.

D width, F feed-forward width.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cli import ENV, ROOT
from safetensors.numpy import save_file

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

# (layers, vocabulary, D, F) -> the most that may be held above the arrays, as a fraction of the checkpoint. Backend and
# compiler take some 60 MiB of their own, whatever the size: the small one only shows that nothing is held twice.
SMALL = (6, 32768, 1024, 2816), 0.6
LARGE = (18, 128256, 2048, 5632), 0.15
DEVICES = {"plain": (1, ()), "one": (1, ("--mesh=-1,1,1",)), "eight": (8, ("--mesh=1,8,1", "--devices=8"))}


def tensor_shapes(layers, vocab_size, D, F):
  """{name: shape} of each of four shards: the table of embeddings, a quarter of the whole, and the layers."""
  block = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D // 4, D), "self_attn.v_proj": (D // 4, D),
           "self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
           "input_layernorm": (D,), "post_attention_layernorm": (D,)}
  return [{"model.embed_tokens.weight": (vocab_size, D), "model.norm.weight": (D,)}] + [
      {f"model.layers.{i}.{name}.weight": shape for i in range(part, layers, 3) for name, shape in block.items()}
      for part in range(3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """checkpoint(sizes) -> directory of a bf16 Llama as a causal model is published, without a classifier's head."""
  made = {}
  def make(sizes):
    if sizes not in made:
      directory = made[sizes] = tmp_path_factory.mktemp("llama")
      values = np.random.default_rng(0).standard_normal(1_000_003).astype(ml_dtypes.bfloat16)
      weight_map = {}
      for i, shapes in enumerate(tensor_shapes(*sizes)):
        file = f"model-{i + 1:05}-of-00004.safetensors"
        save_file({name: np.resize(values, shape) for name, shape in shapes.items()}, directory / file)
        weight_map |= dict.fromkeys(shapes, file)
      layers, vocab_size, D, F = sizes
      (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
      (directory / "config.json").write_text(json.dumps({
          "model_type": "llama", "vocab_size": vocab_size, "hidden_size": D, "intermediate_size": F,
          "num_hidden_layers": layers, "num_attention_heads": D // 64, "num_key_value_heads": D // 256,
          "tie_word_embeddings": True}))
    return made[sizes]
  yield make
  for directory in made.values():
    shutil.rmtree(directory)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("sizes,most", [pytest.param(*SMALL, id="small"),
                                        pytest.param(*LARGE, id="2GiB", marks=pytest.mark.slow)])
def test_loading_takes_little_above_the_arrays(sizes, most, devices, checkpoint):
  """And each device holds what the rules give it: its part of every matrix and of the new head, all of the norms."""
  count, options = DEVICES[devices]
  out = subprocess.run([sys.executable, "benchmarks/load_memory.py", str(checkpoint(sizes)), *options], cwd=ROOT,
                       env=ENV, capture_output=True, text=True)
  assert out.returncode == 0, out.stderr
  got = json.loads(out.stdout.splitlines()[-1])
  shapes = [shape for shard in tensor_shapes(*sizes) for shape in shard.values()]
  matrices = sum(2 * math.prod(shape) for shape in shapes if len(shape) == 2) + 4 * 2 * sizes[2]
  norms = sum(4 * math.prod(shape) for shape in shapes if len(shape) == 1)
  assert list(got["device_bytes"].values()) == [matrices // count + norms] * count
  assert got["array_bytes"] == matrices + count * norms
  assert got["checkpoint_bytes"] > {SMALL: 190, LARGE: 2048}[sizes, most] * 2**20
  assert got["overhead_bytes"] <= most * got["checkpoint_bytes"], got
