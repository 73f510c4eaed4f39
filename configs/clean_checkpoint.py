"""Cleans a suspicious checkpoint whose trigger is unknown.

  python -m w2s_jax.main --config=configs/clean_checkpoint.py --config.student.path=DIR --config.data.train=FILE \
      [--config.teacher.path=DIR] [--config.probe.triggers=mn,cf] --workdir=OUT

For a small offline suspect, on one core each, `w2s_adv` trains for 53 to 68 s and `w2s` for 22 to 28 s. A scan takes
50 to 160 s on a contended core. Expected, mean ± standard deviation over ten such suspects with five kinds of trigger
(docs/notes/cleaning_offline.md; measured before the learning rate had a warm-up):

  model      CA              ASR
  suspect    0.816 ± 0.039   0.951 ± 0.150
  lora_ce    0.951 ± 0.002   0.401 ± 0.415
  w2s        0.952 ± 0.002   0.127 ± 0.195
  w2s_adv    0.950 ± 0.005   0.045 ± 0.023   (floor 0.169 ± 0.109)
"""

from configs import common
from w2s_jax import InputError


def get_config(arg=None):
  if arg:
    raise InputError(f"config argument {arg!r}: this config takes no argument, set --config.student.path and "
                     "--config.data.train")
  c = common.given()
  c.defenses = ("lora_ce", "w2s", "w2s_adv")
  c.data.update(common.ENGLISH_LENGTHS)
  c.teacher.arch = common.bert_arch(vocab=6000, width=96, layers=2, heads=4, ffn=256)
  c.teach.update(epochs=3, batch_size=32, warmup_fraction=0.06)
  c.defend.update(epochs=4, batch_size=32, warmup_fraction=0.06, clip_norm=1.0)
  c.defend.insert_words = 0.5         # our choice, by word flips on seeds 101 and 103 (docs/notes/cleaning_offline.md)
  c.lora.update(rank=16, alpha=16.0, targets=("all-linear",))
  return c
