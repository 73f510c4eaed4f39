"""What loading takes above the arrays themselves, by benchmarks/load_memory.py in a process of its own. Linux only."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cli import ENV, ROOT
from safetensors.numpy import save_file

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A bf16 Llama of 2 GiB in four shards, a quarter of it one table of embeddings."""
  directory = tmp_path_factory.mktemp("llama")
  layers, vocab, D, F, kv = 18, 128256, 2048, 5632, 512
  block = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D),
           "self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
           "input_layernorm": (D,), "post_attention_layernorm": (D,)}
  shards = [{"model.embed_tokens.weight": (vocab, D), "model.norm.weight": (D,)}] + [
      {f"model.layers.{i}.{name}.weight": shape for i in range(part, layers, 3) for name, shape in block.items()}
      for part in range(3)]
  values = np.random.default_rng(0).standard_normal(1_000_003).astype(ml_dtypes.bfloat16)
  weight_map = {}
  for i, shapes in enumerate(shards):
    file = f"model-{i + 1:05}-of-00004.safetensors"
    save_file({name: np.resize(values, shape) for name, shape in shapes.items()}, directory / file)
    weight_map |= dict.fromkeys(shapes, file)
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  (directory / "config.json").write_text(json.dumps({
      "model_type": "llama", "vocab_size": vocab, "hidden_size": D, "intermediate_size": F,
      "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}))
  yield directory
  for file in directory.iterdir():
    file.unlink()


@pytest.mark.parametrize("options", [(), ("--mesh=1,1,1",), ("--mesh=1,8,1", "--devices=8")], ids=["plain", "1", "8"])
def test_loading_takes_little_above_the_arrays(options, checkpoint):
  """At most 15% of the checkpoint; of eight devices each holds an eighth and the replicated norms."""
  out = subprocess.run([sys.executable, "benchmarks/load_memory.py", str(checkpoint), *options], cwd=ROOT, env=ENV,
                       capture_output=True, text=True)
  assert out.returncode == 0, out.stderr
  got = json.loads(out.stdout.splitlines()[-1])
  assert got["checkpoint_bytes"] > 2**31 - 2**20
  assert got["overhead_bytes"] <= 0.15 * got["checkpoint_bytes"]
  if "--devices=8" in options:
    assert max(got["device_bytes"].values()) <= got["checkpoint_bytes"] / 8 + 2**20
