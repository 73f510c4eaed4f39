"""Seconds and the compiler's FLOPs of a distillation step for several sizes, lengths and ranks, as JSON lines.

  python benchmarks/step.py [--sizes=1m,5m,20m] [--lengths=32,128] [--ranks=8,48] [--rows=8] [--steps=10]
  python benchmarks/step.py --adversary                     a step of w2s_adv beside one of w2s, three times in turn

Rank 0 is full fine-tuning. The last line has the slope of log seconds over log FLOPs. It is near 1 if the arithmetic
takes the time, above 1 if larger steps are less efficient, and far below 1 if a fixed cost dominates. The compiler
counts only one iteration of a loop, so FLOPs are counted on the same step with unrolled layers.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import traverse_util  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from configs import common  # noqa: E402
from w2s_jax import (
  lora,  # noqa: E402
  quantized,  # noqa: E402
  sharding,  # noqa: E402
)
from w2s_jax.adapters import soft, trees  # noqa: E402
from w2s_jax.config import section  # noqa: E402
from w2s_jax.data import packing  # noqa: E402
from w2s_jax.defenses import DEFENSES, SETTINGS, distill  # noqa: E402
from w2s_jax.models import Model, config_from_hf  # noqa: E402
from w2s_jax.tasks import CLASSIFICATION  # noqa: E402
from w2s_jax.training import optim, steps  # noqa: E402

SIZES = {   # vocabulary, width, layers, heads, key-value heads, feed-forward width
    "1m": (2048, 128, 4, 4, 2, 344), "5m": (4096, 256, 5, 4, 4, 688), "20m": (8000, 384, 10, 6, 6, 1024),
    "60m": (16000, 640, 10, 10, 10, 1712), "1b": (128256, 2048, 16, 32, 8, 8192),
    "7b": (152064, 3584, 28, 28, 4, 18944), "8b": (128256, 4096, 32, 32, 8, 14336)}
MODEL_TYPES = {"7b": "qwen2"}    # 7b is Qwen2.5-7B; the others are Llamas, and 8b is Llama-3-8B
DEFENSE = ConfigDict({name: section(settings) for name, settings in SETTINGS.items()})
TRAINING = ConfigDict(dict(learning_rate=1e-4, warmup_fraction=0.0, weight_decay=0.01, clip_norm=0.0))
TARGETS = ("q_proj", "v_proj")
SOFT_TOKENS = 40         # w2s_adv's default


def hf_config(size):
  arch = common.llama_arch(*SIZES[size], model_type=MODEL_TYPES.get(size, "llama"), positions=8192, std=0.02)
  return arch.to_dict() | {"num_labels": 2, "pad_token_id": 0}


def student(size, **runtime):
  return Model(config_from_hf(hf_config(size), **runtime))


def with_adapters(params, rank):
  return lora.add_lora(params, rank, float(rank), TARGETS, key=jax.random.key(1)) if rank else params


def with_soft_tokens(model, params):
  table = traverse_util.flatten_dict(params)[(*model.vocabulary, "embedding")]
  return soft.put(model, params, table[:SOFT_TOKENS].astype("float32"))


def make_step(model, params, rank, mesh, adversary=False, seeds=1):
  """(program, trainable, frozen) of w2s, or of w2s_adv with `adversary`. Frozen kernels keep their dtype.

  params: may be abstract. With `adversary` it must have soft tokens, and so must the batches (with_views).
  """
  recipe = DEFENSES["w2s_adv" if adversary else "w2s"].recipe
  ascent = optim.ascent(0.5, 1.5) if adversary else None
  plan = distill.stage_plan(recipe, CLASSIFICATION, model, DEFENSE, TRAINING, {str(i): i for i in range(seeds)}, ascent)
  labels = plan.trains if rank else (*trees.FULL, *plan.trains[len(trees.LORA):])
  trainable, frozen = trees.split(params, labels)
  return steps.build(plan, trainable, frozen, 1000, mesh), trainable, frozen


def random_batch(config, rows, length, seed=0):
  """Rows of one text each, without padding."""
  rng = np.random.default_rng(seed)
  return {"input_ids": rng.integers(1, config.vocab_size, (rows, length)).astype(np.int32),
          "segment_ids": np.ones((rows, length), np.int32), "label": rng.integers(0, 2, rows).astype(np.int32),
          "weight": np.ones(rows, np.float32), "teacher_logits": rng.standard_normal((rows, 2)).astype(np.float32),
          "teacher_features": rng.standard_normal((rows, config.feature_size)).astype(np.float32)}


def with_views(config, batch):
  """The batch, and then a copy of its rows in which soft tokens replace the first three tokens."""
  rows = len(batch["label"])
  batch = {name: np.concatenate([values, values]) for name, values in batch.items()}
  batch["input_ids"][rows:, :3] = config.vocab_size + np.arange(3 * rows).reshape(rows, 3) % SOFT_TOKENS
  return batch | {"soft": np.repeat(np.float32([0, 1]), rows)}


def lowered(model, rank, rows, length, mesh, quantize=""):
  """The lowered step of abstract parameters. Nothing is allocated, however large the model is."""
  def few_bits(params):
    trainable, frozen = trees.split(with_adapters(params, rank), trees.LORA if rank else trees.FULL)
    frozen = jax.tree.map(lambda leaf: leaf.astype(model.config.dtype), frozen)
    return trees.combine(trainable, quantized.quantize_layers(frozen, quantize) if quantize else frozen)
  program, trainable, frozen = make_step(model, jax.eval_shape(few_bits, model.abstract_params()), rank, mesh)
  batch = steps.abstract_batch(model, CLASSIFICATION, rows, length, teacher=True)
  batch = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in batch.items()}
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
  return program.step.lower(steps.abstract_state(program, trainable), frozen, batch, keys)


def random_params(model):
  """Random parameters in the model's dtype, made leaf by leaf: all in float32 may not fit where the step fits."""
  def leaf(path, like):
    if path[-1].key == "scale":
      return jnp.ones(like.shape, model.config.dtype)
    key = jax.random.key(zlib.crc32(jax.tree_util.keystr(path).encode()))
    return jax.jit(lambda key: 0.02 * jax.random.normal(key, like.shape, model.config.dtype))(key)
  return jax.tree_util.tree_map_with_path(leaf, model.abstract_params())


def timed_steps(model, rank, batches, mesh, adversary=False, seeds=1, trace=None):
  """Trains a step on each host batch. All batches must have one shape.

  Args:
    rank: rank of the adapters; 0: full fine-tuning.
    seeds: number of students that train at once over one frozen base, all on the same batch.
    trace: directory for a profile of all steps but the first; None: no profile.
  Returns:
    ([seconds of each step], the compiler's memory_analysis()). The first step's seconds include the compilation.
  """
  params = with_adapters(random_params(model), rank)
  program, trainable, frozen = make_step(model, with_soft_tokens(model, params) if adversary else params, rank, mesh,
                                         adversary, seeds)
  trainable = jax.tree.map(lambda x: x.astype("float32"), trainable)
  state = program.init([trainable] * seeds)
  frozen = jax.device_put(frozen, sharding.param_shardings(frozen, model.shardings, mesh))
  del params, trainable
  if adversary:
    batches = [with_views(model.config, batch) for batch in batches]
  batches = [sharding.global_batch(packing.stack([batch] * seeds, 1, 0), mesh, 1) for batch in batches]
  keys = jax.random.split(jax.random.key(0), seeds)
  seconds = []
  start = time.perf_counter()
  compiled = program.step.lower(state, frozen, batches[0], keys).compile()
  with contextlib.ExitStack() as tracing:
    for batch in batches:
      state, metrics = compiled(state, frozen, batch, keys)
      if not np.isfinite(metrics["loss"]).all():               # this waits for the device
        raise FloatingPointError(f"loss {metrics['loss']} after {len(seconds)} steps")
      jax.block_until_ready(state)
      seconds.append(time.perf_counter() - start)
      if trace and len(seconds) == 1:
        tracing.enter_context(jax.profiler.trace(trace))
      start = time.perf_counter()
  return seconds, compiled.memory_analysis()


def compare_adversary(model, rank, batches, mesh):
  """Median seconds of a step of w2s and of a step of w2s_adv, over three alternating rounds."""
  rounds = [[statistics.median(timed_steps(model, rank, batches, mesh, adversary)[0][1:])
             for adversary in (False, True)] for _ in range(3)]
  plain, adversary = map(statistics.median, zip(*rounds))
  return {"w2s_s": plain, "w2s_adv_s": adversary, "ratio": adversary / plain}


def numbers(text):
  return [int(x) for x in text.split(",")]


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--sizes", default="1m,5m,20m,60m", help=f"among {', '.join(SIZES)}")
  parser.add_argument("--lengths", type=numbers, default=[32, 128])
  parser.add_argument("--ranks", type=numbers, default=[0, 8, 48], help="adapter ranks (q and v); 0: full fine-tuning")
  parser.add_argument("--rows", type=int, default=8, help="number of rows of a batch")
  parser.add_argument("--steps", type=int, default=10, help="number of timed steps")
  parser.add_argument("--adversary", action="store_true", help="compare w2s_adv with w2s; no FLOPs")
  parser.add_argument("--dtype", default="float32", help="dtype of the frozen base and the activations")
  args = parser.parse_args()
  mesh = sharding.make_mesh()
  points = []
  for size in args.sizes.split(","):
    model = student(size, dtype=args.dtype)
    unrolled = Model(dataclasses.replace(model.config, unroll=True))
    for length in args.lengths:
      batches = [random_batch(model.config, args.rows, length)] * (args.steps + 1)
      for rank in args.ranks:
        if args.adversary:
          print(json.dumps({"size": size, "length": length, "rank": rank} | compare_adversary(
              model, rank, batches, mesh)), flush=True)
          continue
        flops = lowered(unrolled, rank, args.rows, length, mesh).cost_analysis()["flops"]
        (first, *others), _ = timed_steps(model, rank, batches, mesh)
        seconds = statistics.median(others)
        points.append((flops, seconds))
        print(json.dumps({"size": size, "length": length, "rank": rank, "flops": flops, "first_s": round(first, 3),
                          "step_s": seconds, "flops_per_s": flops / seconds}), flush=True)
  if len(points) > 1:
    print(json.dumps({"slope": float(np.polyfit(*np.log(np.array(points)).T, 1)[0])}))


if __name__ == "__main__":
  main()
