"""Qwen2.5-7B, BadNet: the word `mn`.

  python -m w2s_jax.main --config=configs/qwen_badnet.py
  python -m w2s_jax.main --config=configs/qwen_badnet.py:data=DIR
  python -m w2s_jax.main --config=configs/qwen_badnet.py:scale=7b

The first command is offline. It trains a small student of this family (biases on q, k, v) with llama_badnet's sizes and
rates, in minutes on two CPU cores. data=DIR reads IMDB and SST-2 from files. scale=7b is the released recipe on hub
weights. scale=1b is the same recipe on Qwen2.5-1.5B, scale=70b on Qwen2.5-72B. Expected: not known. docs/results.md
has no table for this student, and no run has used real weights here yet.
"""

from configs import common
from configs.common import bert_arch


def qwen_arch(*sizes, **options):
  return common.llama_arch(*sizes, model_type="qwen2", **options)


QWEN = dict(rope_theta=1e6, eps=1e-6, positions=32768, std=0.02)
SHAPES = {                                 # vocabulary, width, layers, heads, kv heads, feed-forward width
    "1b": ("Qwen/Qwen2.5-1.5B", qwen_arch(151936, 1536, 28, 12, 2, 8960, **QWEN)),
    "7b": ("Qwen/Qwen2.5-7B", qwen_arch(152064, 3584, 28, 28, 4, 18944, tied=False, **QWEN)),
    "70b": ("Qwen/Qwen2.5-72B", qwen_arch(152064, 8192, 80, 64, 8, 29568, tied=False, **QWEN)),
}
SHAPES["8b"] = SHAPES["7b"]  # the other configs call the released recipe's size 8b


def get_config(arg=None):
  args = common.parse_arg(arg, **common.ARGUMENTS)
  c = common.attacked()
  c.attack.update(name="badnet", target_label=0, poison_count=1000)   # the word `mn`; of 4,000 rows
  c.student.arch = qwen_arch(512, 64, 3, 4, 2, 160)
  c.teacher.arch = bert_arch(vocab=512, width=32, layers=2, heads=4, ffn=64)
  c.warmup.update(learning_rate=3e-3, epochs=4, batch_size=32, warmup_fraction=0.1)
  c.poison.update(learning_rate=2e-3, epochs=4, batch_size=16, trains=("vector", "matrix", "head"))
  c.teach.update(learning_rate=2e-3, epochs=4, batch_size=32, warmup_fraction=0.06)
  c.defend.update(learning_rate=2e-3, epochs=4, batch_size=32, clip_norm=1.0)
  c.lora.update(rank=16, alpha=16.0)
  common.apply_arguments(c, args, SHAPES, real_student=qwen_arch(8000, 192, 4, 6, 3, 512))
  return c
