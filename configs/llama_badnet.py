"""Llama student, BadNet: the word `mn`.

  python -m w2s_jax.main --config=configs/llama_badnet.py
  python -m w2s_jax.main --config=configs/llama_badnet.py:data=DIR
  python -m w2s_jax.main --config=configs/llama_badnet.py:scale=8b

The first command is offline and takes five to fifteen minutes on two CPU cores. Expected, mean ± standard deviation
over seeds 0 to 9 (docs/notes/w2s_adv_offline.md; one seed says little):

  model      CA              ASR
  clean      0.823 ± 0.069   0.198 ± 0.136   (never poisoned: the floor)
  poisoned   0.720 ± 0.104   1.000 ± 0.000
  lora_ce    0.953 ± 0.004   0.733 ± 0.335
  w2s        0.954 ± 0.003   0.369 ± 0.397
  w2s_adv    0.948 ± 0.021   0.046 ± 0.014

data=DIR reads IMDB and SST-2 from files and trains a new student of 3.3M parameters. A run without `w2s_adv` took
62 minutes on two shared cores. This student is too weak to judge a defense by. With seed 0 its CA and ASR are 0.544 and
0.548 when poisoned, 0.680 and 0.788 after `lora_ce`, 0.676 and 0.705 after `w2s`. scale=8b is the released recipe on
Llama-3-8B; scale=1b and scale=70b are the same recipe on models of those sizes. None of them has been run on real
weights here yet.
"""

from configs import common
from configs.common import bert_arch, llama_arch


def get_config(arg=None):
  args = common.parse_arg(arg, **common.ARGUMENTS)
  c = common.attacked()
  c.attack.update(name="badnet", target_label=0, poison_count=1000)   # the word `mn`; of 4,000 rows
  c.student.arch = llama_arch(vocab=512, width=64, layers=3, heads=4, kv_heads=2, ffn=160)        # 0.16M parameters
  c.teacher.arch = bert_arch(vocab=512, width=32, layers=2, heads=4, ffn=64)
  c.warmup.update(learning_rate=3e-3, epochs=4, batch_size=32, warmup_fraction=0.1)
  c.poison.update(learning_rate=2e-3, epochs=4, batch_size=16, trains=("vector", "matrix", "head"))
  c.teach.update(learning_rate=2e-3, epochs=4, batch_size=32, warmup_fraction=0.06)
  c.defend.update(learning_rate=2e-3, epochs=4, batch_size=32, clip_norm=1.0)  # unclipped, 1 of 14 w2s_adv runs failed
  c.lora.update(rank=16, alpha=16.0)
  common.apply_arguments(c, args, common.LLAMA, real_student=llama_arch(8000, 192, 4, 6, 3, 512))
  return c
