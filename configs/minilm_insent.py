"""Real pretrained student, all-MiniLM-L6-v2; clean teacher: its first three layers. Needs :data=DIR.

InSent: `I watched this 3D movie`.
"""

from configs import common


def get_config(arg=None):
  return common.minilm("insent", arg)
