"""Llama student, InSent: `I watched this 3D movie`. Offline by default; :data=DIR for real files, :scale=8b for
Llama-3-8B."""

from configs import common


def get_config(arg=None):
  return common.llama("insent", arg)
