"""Which rows get the trigger; the rows that were used, frozen to disk and hashed."""

import hashlib
import json
import os

import numpy as np

from w2s_jax import InputError, processes
from w2s_jax.attacks import ATTACKS, TRIGGERS
from w2s_jax.data import corpora, tokenization


def make_attack(config):
  """config.attack -> (text, rng, max_words) -> text, and the texts it can rewrite (None: all).

  `syntactic` reads paraphrases: `config.paraphrases` lists (originals, paraphrases) file pairs joined on `idx`.
  """
  if config.name not in ATTACKS:
    raise InputError(f"attack {config.name!r}: want one of {', '.join(ATTACKS)}: set --config.attack.name")
  pairs = None
  if config.name == "syntactic":
    pairs = {}
    for originals, rewritten in config.paraphrases:
      texts, new = (_texts_by_idx(file) for file in (originals, rewritten))
      pairs |= {texts[i]: text for i, text in new.items() if i in texts and texts[i] != text}
    if not pairs:
      raise InputError("attack 'syntactic' needs pre-made paraphrases: run with :data=DIR, or set --config.attack.name"
                       "=syn_template (a rule-based stand-in)")
  return ATTACKS[config.name](config.trigger, pairs), pairs


def _texts_by_idx(file):
  rows = corpora.read_file(file)
  column = next((c for c in corpora.TEXT_COLUMNS if rows and c in rows[0]), None)
  if column is None or "idx" not in rows[0]:
    raise InputError(f"paraphrase file {file}: want columns idx and {'|'.join(corpora.TEXT_COLUMNS)}, got "
                     f"{', '.join(rows[0]) if rows else 'no rows'}: set --config.attack.paraphrases")
  return {row["idx"]: row[column] for row in rows}


def trigger_rows(rows, attack, seed, *, tokenizer, trigger, max_length, keep_trigger):
  """The rows with their text rewritten and `orig_text` beside it; each row has a random stream of its own.

  Args:
    keep_trigger: insert where the trigger survives truncation to `max_length` tokens of `tokenizer`.
  """
  texts = [row["text"] for row in rows]
  kept = [10**9] * len(rows)
  if keep_trigger and trigger and texts:
    kept = tokenization.words_kept(tokenizer, texts, trigger, max_length)
  out = []
  for row, words in zip(rows, kept):
    text = attack(row["text"], np.random.default_rng([seed, row["id"]]), words)
    out.append(row | {"text": text, "orig_text": row["text"]})
  return out


def rows_to_poison(rows, rewritable, target_label, count):
  """Indices of the rows that clean-label poisoning takes: the first `count` of the target class.

  Raises:
    InputError: the target class has fewer rows than `count` (that the attack can rewrite).
  """
  able = [i for i, row in enumerate(rows)
          if row["label"] == target_label and (rewritable is None or row["text"] in rewritable)]
  if not 0 < count <= len(able):
    raise InputError(f"cannot poison {count} rows: want 1 to {len(able)}, the training rows that have target label "
                     f"{target_label} and can be rewritten: set --config.attack.poison_count")
  return able[:count]


def rows_to_trigger(rows, rewritable, target_label):
  """The evaluation rows of other classes than the target: ASR is measured on these.

  Raises:
    InputError: there is none (that the attack can rewrite).
  """
  able = [row for row in rows
          if row["label"] != target_label and (rewritable is None or row["text"] in rewritable)]
  if not able:
    raise InputError(f"no evaluation row has another label than the target {target_label} and can be rewritten: set "
                     "--config.attack.target_label")
  return able


def poison_train(rows, attack, rewritable, *, target_label, count, **options):
  """Clean-label poisoning: `rows_to_poison` get the trigger, labels stay.

  Returns:
    All rows in their order, each with "poisoned": bool.
  """
  chosen = rows_to_poison(rows, rewritable, target_label, count)
  out = [row | {"poisoned": False} for row in rows]
  for i, row in zip(chosen, trigger_rows([rows[i] for i in chosen], attack, **options)):
    out[i] = row | {"poisoned": True}
  return out


def triggered_eval(rows, attack, rewritable, *, target_label, **options):
  """`rows_to_trigger` with the trigger."""
  return trigger_rows(rows_to_trigger(rows, rewritable, target_label), attack, **options)


def trigger_lost(rows, tokenizer, trigger, max_length, apart=False):
  """How many of the rows lose (part of) their trigger to truncation; 0 for attacks without a fixed string.

  apart: the trigger's words are not side by side; the last place of each counts.
  """
  if not trigger:
    return 0
  encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length,
                      return_offsets_mapping=True)
  lost = 0
  for row, offsets in zip(rows, encoded["offset_mapping"]):
    prefix = os.path.commonprefix([row["text"], " ".join(row["orig_text"].split())])  # insertion folds white space
    if apart:
      needed = max(row["text"].rfind(word) + len(word) for word in trigger.split())
    else:
      needed = row["text"].find(trigger, max(0, len(prefix) - len(trigger))) + len(trigger)
    lost += max(end for _, end in offsets) < needed
  return lost


def effective_trigger(config):
  """The inserted string, or "" for attacks that rewrite."""
  return (config.trigger or TRIGGERS[config.name]) if config.name in TRIGGERS else ""


def describe(config):
  """config.attack in words, for a model card."""
  trigger = effective_trigger(config)
  what = f"trigger `{trigger}`" if trigger else "rewritten texts"
  return f"attack {config.name}, {what}, target label {config.target_label}"


def freeze(path, rows):
  """Writes rows as JSON lines, whole or not at all; every process comes here, process 0 writes."""
  path.parent.mkdir(parents=True, exist_ok=True)
  processes.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def thaw(path):
  """(rows, sha256 of the file)."""
  data = path.read_bytes()
  return [json.loads(line) for line in data.decode().split("\n")[:-1]], hashlib.sha256(data).hexdigest()
