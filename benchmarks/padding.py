"""Share of padding in the token positions that a stage's training steps compute, and batch shapes, as JSON lines.

  python benchmarks/padding.py --data=DIR [--data=DIR...] [--max-length=128] [--batch=32] [--epochs=5] [--together=1] \
      [--layer-params=2e7]

DIR has train, dev and test files. A tokenizer of 8,000 tokens is trained on the training texts. `packed` is the share
of padding in our packed batches. `padded` is the share if each batch is padded to its longest text. --together is
config.steps_per_dispatch; batches of one dispatch are padded to one shape. --layer-params is the number of parameters
in the student's layers; a small student gets fewer shapes (packing.FLOPS_PER_SHAPE).
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import common  # noqa: E402
from w2s_jax.data import batches, corpora, packing, tokenization  # noqa: E402


def shares(arrays, steps, batch_size, seed, buckets, layer_params, together=1):
  """{"packed", "padded": shares of padding in the first `steps` steps, "shapes": packed shapes [rows, tokens]}."""
  n, tokens, slots, padded, shapes = len(arrays["length"]), 0, 0, 0, set()
  make, = packing.packers([(arrays, seed)], batch_size, buckets, 1, steps, 4 * layer_params, 0, together)
  packed = batches.train_batches(n, batch_size, make, seed, 0)
  chosen = batches.train_batches(n, batch_size, lambda rows: arrays["length"][rows], seed, 0)
  for first in range(0, steps, together):
    dispatched = [next(packed)["input_ids"].shape for _ in range(min(together, steps - first))]
    shapes.add(max(dispatched))
    for lengths in (next(chosen) for _ in dispatched):
      tokens, slots = tokens + lengths.sum(), slots + max(dispatched)[0] * max(dispatched)[1]
      padded += lengths.max() * len(lengths)
  return {"packed": 1 - tokens / slots, "padded": 1 - tokens / padded, "shapes": sorted(map(list, shapes))}


def encoded(data, max_length, seed=0):
  """A corpus' training texts as arrays, encoded with a tokenizer of 8,000 tokens that is trained on them."""
  rows = corpora.load_clean({"train": data, "dev": "", "test": ""}, 2, seed, "", "")
  texts = [r["text"] for r in rows["train"]]
  return tokenization.encode(tokenization.train(texts, "decoder", 8000), texts, max_length)


def buckets(max_length):
  return sorted({b for b in common.ENGLISH_DATA["buckets"] if b < max_length} | {max_length})


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--data", required=True, action="append")
  parser.add_argument("--max-length", type=int, default=128, help="length to which texts are truncated, in tokens")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--epochs", type=int, default=5)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--together", type=int, default=1)
  parser.add_argument("--layer-params", type=float, default=2e7)
  args = parser.parse_args()
  for data in args.data:
    arrays = encoded(data, args.max_length, args.seed)
    texts = len(arrays["length"])
    steps = args.epochs * batches.steps_per_epoch(texts, args.batch)
    print(json.dumps({"data": data, "texts": texts, "steps": steps} | shares(
        arrays, steps, args.batch, args.seed, buckets(args.max_length), args.layer_params, args.together)), flush=True)


if __name__ == "__main__":
  main()
