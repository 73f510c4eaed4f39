"""A suspicious checkpoint in, a clean one out; no attack is made.

  python -m w2s_jax.main --config=configs/clean_checkpoint.py --config.student.path=DIR --config.data.train=FILE \
      [--config.teacher.path=DIR] [--config.probe.triggers="('mn','cf')"] --workdir=OUT
"""

from configs import common
from w2s_jax import InputError


def get_config(arg=None):
  if arg:
    raise InputError(f"config argument {arg!r}: this config takes no argument, set --config.student.path and "
                     "--config.data.train")
  return common.clean_checkpoint()
