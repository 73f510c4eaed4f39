"""Real pretrained student, all-MiniLM-L6-v2; clean teacher: its first three layers. Needs :data=DIR.

BadNet: the word `mn`.
"""

from configs import common


def get_config(arg=None):
  return common.minilm("badnet", arg)
