"""Vicuna-7B, BadNet: the word `mn`.

  python -m w2s_jax.main --config=configs/vicuna_badnet.py
  python -m w2s_jax.main --config=configs/vicuna_badnet.py:data=DIR
  python -m w2s_jax.main --config=configs/vicuna_badnet.py:scale=7b

The first command is offline. It trains a small student of this family (as many kv heads as heads) with llama_badnet's
sizes and rates, in minutes on two CPU cores. data=DIR reads IMDB and SST-2 from files. scale=7b is the released recipe
on hub weights, scale=13b the same recipe on Vicuna-13B. Expected: not known. docs/results.md has no table for this
student, and no run has used real weights here yet.
"""

from configs import common
from configs.common import bert_arch, llama_arch

VICUNA = dict(tied=False, positions=4096, std=0.02)
SHAPES = {                                 # vocabulary, width, layers, heads, kv heads, feed-forward width
    "7b": ("lmsys/vicuna-7b-v1.5", llama_arch(32000, 4096, 32, 32, 32, 11008, **VICUNA)),
    "13b": ("lmsys/vicuna-13b-v1.5", llama_arch(32000, 5120, 40, 40, 40, 13824, **VICUNA)),
}
SHAPES["8b"] = SHAPES["7b"]  # the other configs call the released recipe's size 8b


def get_config(arg=None):
  args = common.parse_arg(arg, **common.ARGUMENTS)
  c = common.attacked()
  c.attack.update(name="badnet", target_label=0, poison_count=1000)   # the word `mn`; of 4,000 rows
  c.student.arch = llama_arch(vocab=512, width=64, layers=3, heads=4, kv_heads=4, ffn=160)
  c.teacher.arch = bert_arch(vocab=512, width=32, layers=2, heads=4, ffn=64)
  c.warmup.update(learning_rate=3e-3, epochs=4, batch_size=32, warmup_fraction=0.1)
  c.poison.update(learning_rate=2e-3, epochs=4, batch_size=16, trains=("vector", "matrix", "head"))
  c.teach.update(learning_rate=2e-3, epochs=4, batch_size=32, warmup_fraction=0.06)
  c.defend.update(learning_rate=2e-3, epochs=4, batch_size=32, clip_norm=1.0)
  c.lora.update(rank=16, alpha=16.0)
  common.apply_arguments(c, args, SHAPES, real_student=llama_arch(8000, 192, 4, 6, 6, 512))
  return c
