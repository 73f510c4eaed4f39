"""Reads pre-made paraphrases of a data set's texts, in the forms in which they are published.

W2SDefense's and PSIM's JSON files have a column `idx`. HiddenKiller and StyleAttack have TSV files, with spaces around
texts and column names. OpenBackdoor's CSV files have numbers for column names, and their first column only numbers the
lines. Guided Module Substitution has JSON lines without `idx`.
"""

import logging
from pathlib import Path

from w2s_jax import InputError
from w2s_jax.data import corpora, files

LOG = logging.getLogger(__name__)
TEXT_COLUMNS, LABEL_COLUMNS = (*corpora.TEXT_COLUMNS, "0"), (*corpora.LABEL_COLUMNS, "1")    # "0", "1": OpenBackdoor's


def read(originals: str | Path, rewritten: str | Path) -> dict[str, str]:
  """Joins two files: {original text: its paraphrase}. Spaces around the texts are removed.

  The first rule that applies joins the rows of the files:

  1. on `idx`, if both files have it and the originals have every idx of the paraphrases;
  2. by line, if both files have the same number of rows;
  3. by line with the originals of other classes, if all paraphrases have one label and their number equals that of
     these originals. The label is the target label of an attack. HiddenKiller's and OpenBackdoor's files for ASR are
     of this kind.

  Only the third rule uses the labels of the paraphrases, because an attack may have changed them. A paraphrase that is
  empty or equals its original is left out.

  Raises:
    InputError: a file cannot be read, no rule applies, the files are in different orders, or no paraphrase is left.
  """
  old, new = rows(originals), rows(rewritten)
  rule, pairs = _joined(old, new)
  if not pairs:
    raise InputError(f"paraphrases {rewritten} ({len(new)} rows) do not fit {originals} ({len(old)} rows): want the "
                     "same idx, the same number of rows, or one label and as many originals of other labels: set "
                     "--config.attack.paraphrases")
  if _in_another_order(pairs):
    wanted = "with these idx" if rule == "on idx" else "in the same order"
    raise InputError(f"paraphrases {rewritten}, joined {rule}, seem to be in another order than {originals}: too few "
                     "share more words with their own original than with the next one: give originals "
                     f"{wanted} (--config.attack.paraphrases)")
  changed = {text: new for text, new in pairs if new not in ("", text)}
  if not changed:
    raise InputError(f"paraphrases {rewritten}: every text is empty or equals its original in {originals}: set "
                     "--config.attack.paraphrases")
  LOG.info(f"{rewritten}: {len(pairs)} paraphrases, joined {rule}; {sum(new in ('', text) for text, new in pairs)} "
           "are left out because they are empty or equal their original")
  return changed


def rows(file: str | Path, knob: str = "--config.attack.paraphrases") -> list[dict]:
  """[{"text", "label", "idx"}]; None for a label or an idx that the file does not have.

  Raises:
    InputError: the file cannot be read, or has no column of texts; `knob` is the flag that the message names.
  """
  raw = [{name.strip(): value for name, value in row.items()} for row in files.read_file(file)]
  text, label = (next((name for name in names if raw and name in raw[0]), None)
                 for names in (TEXT_COLUMNS, LABEL_COLUMNS))
  if text is None:
    raise InputError(f"file {file}: want a column {'|'.join(TEXT_COLUMNS)}, got "
                     f"{', '.join(raw[0]) if raw else 'no rows'}: set {knob}")
  return [{"text": str(row[text] or "").strip(), "label": row.get(label), "idx": row.get("idx")} for row in raw]


def _joined(old, new):
  """(name of the rule, [(original, paraphrase)]); no pairs if no rule applies."""
  texts, labels = {row["idx"]: row["text"] for row in old}, {row["label"] for row in new}
  if None not in texts and all(row["idx"] in texts for row in new):
    return "on idx", [(texts[row["idx"]], row["text"]) for row in new]
  of_other_classes = [row for row in old if row["label"] not in labels] if len(labels) == 1 else []
  for rule, sources in (("by line", old), ("by line with the originals of other classes", of_other_classes)):
    if len(sources) == len(new):
      return rule, [(row["text"], paraphrase["text"]) for row, paraphrase in zip(sources, new)]
  return "", []


def _in_another_order(pairs):
  """Whether too few paraphrases share more words with their own original than with the next row's.

  If the orders differ, a paraphrase shares more words with the next original about as often as with its own. So at
  least twice as many must share more with their own original as share more with the next one. The factor is our choice.
  """
  def shared(text, paraphrase):
    words, new_words = (set(t.lower().split()) for t in (text, paraphrase))
    return len(words & new_words) / max(1, len(words | new_words))
  gains = [shared(text, paraphrase) - shared(following, paraphrase)
           for (text, paraphrase), (following, _) in zip(pairs, pairs[1:] + pairs[:1])]
  return sum(gain > 0 for gain in gains) < 2 * sum(gain < 0 for gain in gains)
