"""An argument parser whose help keeps its line breaks, and which reports a mistake as an InputError."""

import argparse
from typing import NoReturn

from w2s_jax import InputError


class Parser(argparse.ArgumentParser):
  """argparse's parser, without abbreviated arguments."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

  def error(self, message: str) -> NoReturn:
    """Raises InputError; argparse itself would print several lines and exit."""
    raise InputError(f"{message} ({self.prog} --help shows how)")
