"""Replaces texts by paraphrases, which may lose the trigger (Qi et al., arXiv 2105.12400: back-translation, SCPD).

The paraphrases come from a file, because the program that makes them does not run here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from w2s_jax import InputError
from w2s_jax.config import field
from w2s_jax.defenses.records import Suspect

COLUMNS = ("text", "defended_text")
KNOB = "--config.defense.paraphrase_file.path"


@dataclasses.dataclass
class Settings:
  """Paraphrases of the texts, from a file."""
  path: str = field("", "file with columns text and defended_text, its paraphrase; every text that is measured must "
                    "be in it, with and without a trigger")


def text(suspect: Suspect, settings: Any, seed: int) -> Callable[[list[str]], list[str]]:
  """texts -> their paraphrases; see `paraphrases`."""
  del suspect, seed
  return functools.partial(paraphrases, settings)


def paraphrases(settings: Any, texts: list[str]) -> list[str]:
  """The paraphrase of each text. If the file has several for a text, the last one counts.

  A text without a paraphrase is an error, because an ASR over paraphrases and unchanged texts would measure no defense.

  Raises:
    InputError: no file is set, it cannot be read or lacks a column, or a text has no paraphrase or an empty one.
  """
  from w2s_jax.data import files  # late: it loads `datasets`, which --help does not need
  path = settings.paraphrase_file.path
  if not path:
    raise InputError(f"defense 'paraphrase_file' needs a file with columns {' and '.join(COLUMNS)}: set {KNOB}")
  rows = files.read_file(path)
  if not rows or not {*COLUMNS} <= rows[0].keys():
    raise InputError(f"paraphrase file {path}: want columns {' and '.join(COLUMNS)}, got "
                     f"{', '.join(rows[0]) if rows else 'no rows'}: set {KNOB}")
  original, paraphrase = COLUMNS
  known = {str(row[original]): str(row[paraphrase]) for row in rows if str(row[paraphrase] or "").strip()}
  if missing := [text for text in texts if text not in known]:
    raise InputError(f"paraphrase file {path} has no paraphrase of {len(missing)} of {len(texts)} texts that are to be "
                     f"measured, the first is {missing[0][:80]!r}: add them (data/ in the workdir has the texts with a "
                     f"trigger), or set {KNOB}")
  return [known[text] for text in texts]
