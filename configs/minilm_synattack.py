"""Real pretrained student, all-MiniLM-L6-v2; clean teacher: its first three layers. Needs :data=DIR.

SynAttack from pre-made paraphrases.
"""

from configs import common


def get_config(arg=None):
  return common.minilm("syntactic", arg)
