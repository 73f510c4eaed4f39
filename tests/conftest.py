"""What all tests share: eight virtual CPU devices, no network, and tiny models whose weights are not close to zero."""

import dataclasses
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                # no test may use a network; set before huggingface_hub is imported
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ["JAX_PLATFORMS"] == "cpu":          # no expensive LLVM passes, as most tests compile longer than they run
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
ROOT = Path(__file__).resolve().parents[1]
# All tests, and later runs of pytest, share one cache of compiled programs. `pytest --cache-clear` deletes it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache/d/xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)       # before any backend is used

import filelock  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from cli import CONFIG, SHORT, w2s  # noqa: E402

from w2s_jax.models import Model  # noqa: E402
from w2s_jax.models.encoder import EncoderConfig  # noqa: E402
from w2s_jax.models.gpt2 import GPT2Config  # noqa: E402
from w2s_jax.models.llama import LlamaConfig  # noqa: E402
from w2s_jax.models.modernbert import ModernBertConfig  # noqa: E402

# Every dimension that is sharded over a mesh axis is divisible by 8.
LLAMA = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2,
                    head_dim=8, max_positions=64, initializer_range=0.2, pad_token_id=0, tie_embeddings=True)
BERT = EncoderConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, max_positions=64,
                  hidden_dropout=0.0, attention_dropout=0.0, head_dropout=0.0, initializer_range=0.2)

ELECTRA = dataclasses.replace(BERT, model_type="electra", embedding_size=16)

MODERNBERT = ModernBertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, window=2,
                              rope_thetas=(100.0, 20.0), mean_pooling=True, initializer_range=0.2, pad_token_id=0)

GPT2 = GPT2Config(vocab_size=64, hidden_size=32, num_layers=3, num_heads=4, max_positions=64, initializer_range=0.2)


UNTIL = float(os.environ.get("W2S_UNTIL", "inf"))


def pytest_collection_modifyitems(items):
  """Runs test_readme.py, the longest file, first, so that two workers end at the same time.

  Its slow tests run after all other slow tests, because the time for slow tests may run out.
  """
  items.sort(key=lambda item: (item.path.name == "test_readme.py") == bool(item.get_closest_marker("slow")))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Skips slow tests that would begin after the time W2S_UNTIL, in seconds since the epoch."""
  if item.get_closest_marker("slow") and time.time() > UNTIL:
    pytest.skip("no time left")


def _with_params(config, seed):
  """(Model, params) whose norms and biases are random too, so that swapping or dropping one shows."""
  model = Model(config)
  leaves, tree = jax.tree.flatten(model.init(jax.random.key(seed)))
  rng = np.random.default_rng(seed)
  return model, tree.unflatten([x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves])


@pytest.fixture(scope="session")
def llama():
  """(Model, params): a decoder of width 32, three layers, grouped-query attention."""
  return _with_params(LLAMA, 1)


@pytest.fixture(scope="session")
def bert():
  """(Model, params): an encoder of width 32, three layers, transformers' pooler and classifier."""
  return _with_params(BERT, 2)


@pytest.fixture(scope="session")
def electra():
  """(Model, params): an encoder of width 32 whose embeddings are 16 wide, three layers."""
  return _with_params(ELECTRA, 5)


@pytest.fixture(scope="session")
def modernbert():
  """(Model, params): an encoder of width 32, mean pooling, three layers. Two of them see two tokens to each side."""
  return _with_params(MODERNBERT, 6)


@pytest.fixture(scope="session")
def gpt2():
  """(Model, params): a decoder of width 32, three layers, learned positions."""
  return _with_params(GPT2, 4)


@pytest.fixture(scope="session")
def teacher():
  """(Model, params): an encoder with the W2S widening head, 32 -> 40."""
  return _with_params(dataclasses.replace(BERT, feature_width=40), 3)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
  """The workdir of a finished BadNet run of a few steps. All workers share it, so a test may change only a copy."""
  folder = tmp_path_factory.getbasetemp()
  workdir = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "tiny_run/run"
  workdir.parent.mkdir(exist_ok=True)
  with filelock.FileLock(f"{workdir}.lock"):
    out = w2s(CONFIG, f"--workdir={workdir}", *SHORT)                  # a finished run answers at once
  assert out.returncode == 0, out.stderr
  return workdir


@pytest.fixture(scope="session")
def make_batch():
  """make_batch(model, rows=8, tokens=12, seed=0) -> host batch of a distillation step, ragged, padded on the right."""
  def make(model, rows=8, tokens=12, seed=0):
    rng = np.random.default_rng(seed)
    c = model.config
    lengths = rng.integers(2, tokens - 2, rows)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int32)
    return {
        "input_ids": rng.integers(1, c.vocab_size, (rows, tokens)).astype(np.int32) * mask, "segment_ids": mask,
        "label": rng.integers(0, c.num_labels, rows).astype(np.int32), "weight": np.ones(rows, np.float32),
        "teacher_logits": rng.standard_normal((rows, c.num_labels)).astype(np.float32),
        "teacher_features": rng.standard_normal((rows, c.feature_size)).astype(np.float32)}
  return make
