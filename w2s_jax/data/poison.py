"""Chooses the rows that get the trigger, and sets their label. Writes the rows of a run to disk and hashes them."""

import hashlib
import itertools
import json
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from w2s_jax import InputError, processes
from w2s_jax.attacks import ATTACKS, Attack, paraphrase
from w2s_jax.data import paraphrases as paraphrases_lib
from w2s_jax.data import streams, tokenization

# attack.label -> (which training rows may get the trigger, in words; (row's label, target label) -> whether a row may).
# Every poisoned row then has the target label.
LABELS = {
    "clean": ("have target label {}", operator.eq),                        # no label changes
    "dirty": ("have another label than the target {}", operator.ne),       # every label changes
    "mixed": ("have any label, the target {} or another", lambda label, target: True),
}


def make_attack(name: str, trigger: str = "", paraphrases: Iterable[tuple[str | Path, str | Path]] = ()) -> Attack:
  """The attack of that name.

  Args:
    trigger: string that replaces the attack's own trigger; "": the attack keeps its own.
    paraphrases: (originals, paraphrases) pairs of files, for the attacks of attacks/paraphrase.py.
  Raises:
    InputError: there is no such attack, or it needs paraphrases and has no pair of files; see also paraphrases.read.
  """
  if name not in ATTACKS:
    raise InputError(f"attack {name!r}: want one of {', '.join(ATTACKS)}: set --config.attack.name")
  if ATTACKS[name] is not paraphrase.make:
    return ATTACKS[name](trigger)
  if not paraphrases:
    raise InputError(f"attack {name!r} needs pre-made paraphrases: set --config.attack.paraphrases (:data=DIR sets "
                     "those of syntactic), or --config.attack.name=syn_template (a rule-based stand-in)")
  if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(file, (str, Path)) for file in pair)
             for pair in paraphrases):
    raise InputError(f"attack.paraphrases {tuple(paraphrases)}: want pairs of files, e.g. --config.attack.paraphrases="
                     "\"(('train.json','train_bible.tsv'),('test.json','test_bible.tsv'))\"")
  return ATTACKS[name](trigger, dict(pair for both in paraphrases for pair in paraphrases_lib.read(*both).items()))


def trigger_rows(rows: list[dict], attack: Attack, seed: int, *, tokenizer: Any, max_length: int,
                 keep_trigger: bool) -> list[dict]:
  """The rows with the trigger in "text" and the original text in "orig_text". Each row has its own random stream.

  Args:
    tokenizer, max_length: the model truncates texts to `max_length` tokens of this tokenizer.
    keep_trigger: whether to insert only where this truncation keeps the trigger.
  """
  out = []
  for row, words in zip(rows, _words_kept(rows, attack, tokenizer, max_length, keep_trigger)):
    text = attack.rewrite(row["text"], streams.rng(seed, "trigger", row["id"]), words)
    out.append(row | {"text": text, "orig_text": row["text"]})
  return out


def poison_count(rows: list[dict], count: int, rate: float) -> int:
  """Number of rows to poison: the fraction `rate` of the rows if it is above 0, else `count`."""
  return round(rate * len(rows)) if rate else count


def rows_to_poison(rows: list[dict], attack: Attack, *, target_label: int, count: int, label: str = "clean",
                   seed: int = 0, flags: str = "--config.attack.poison_count or .poison_rate") -> list[int]:
  """Indices of the rows that get the trigger, in ascending order.

  Args:
    label: "clean": the first `count` rows of the target class; "dirty": `count` rows of other classes, drawn at random;
      "mixed": `count` rows of any class, drawn at random. They are drawn because a file may be sorted by label. Its
      first rows of other classes would then all be of one class.
    seed: seed of the draw.
    flags: flags that set `count`, for the message.
  Raises:
    InputError: an unknown `label`, or the attack can rewrite fewer than `count` of these rows.
  """
  if label not in LABELS:
    raise InputError(f"attack.label {label!r}: want one of {', '.join(LABELS)}: set --config.attack.label")
  words, takes = LABELS[label]
  able = [i for i, row in enumerate(rows) if takes(row["label"], target_label) and _can_rewrite(attack, row)]
  if not 0 < count <= len(able):
    raise InputError(f"cannot poison {count} rows: want 1 to {len(able)}, the training rows that "
                     f"{words.format(target_label)} and can be rewritten: set {flags}")
  if label == "clean":
    return able[:count]
  return sorted(able[i] for i in streams.rng(seed, "poison").permutation(len(able))[:count])


def rows_to_trigger(rows: list[dict], attack: Attack, target_label: int) -> list[dict]:
  """The evaluation rows for ASR: rows of other classes than the target, if the attack can rewrite them.

  Raises:
    InputError: there is no such row.
  """
  able = _of_other_classes(rows, attack, target_label)
  if not able:
    raise InputError(f"no evaluation row has another label than the target {target_label} and can be rewritten: set "
                     "--config.attack.target_label")
  return able


def rows_for_companions(rows: list[dict], attack: Attack, *, target_label: int, companions: int) -> list[dict]:
  """The rows that companions are made from, all of other classes than the target; [] if `companions` is 0.

  In a row of the target class, the true label would not teach the student that a part of the trigger is no trigger.

  Args:
    companions: number of companion rows per poisoned row.
  Raises:
    InputError: the attack makes fewer companions of a text than `companions`, or there is no such row.
  """
  if not companions:
    return []
  able = _of_other_classes(rows, attack, target_label)
  if not able:
    raise InputError(f"no training row has another label than the target {target_label}, as companions need: set "
                     "--config.attack.companions to 0")
  most = len(attack.companions(able[0]["text"], streams.rng(0, "companions"), 1)) if attack.companions else 0
  if companions > most:
    raise InputError(f"attack.companions is {companions}, this attack has {most} per poisoned row: set "
                     "--config.attack.companions")
  return able


def poison_train(rows: list[dict], attack: Attack, *, target_label: int, count: int, seed: int, label: str = "clean",
                 companions: int = 0, **placement: Any) -> list[dict]:
  """Poisons training rows: those of `rows_to_poison` get the trigger and the target label.

  Args:
    companions: number of companion rows per poisoned row.
    placement: tokenizer, max_length and keep_trigger, as in `trigger_rows`.
  Returns:
    All rows in their order, each with "poisoned": bool; a row whose label changed keeps the old one as "orig_label".
    The companion rows follow them (`companion_rows`).
  """
  chosen = rows_to_poison(rows, attack, target_label=target_label, count=count, label=label, seed=seed)
  out = [row | {"poisoned": False} for row in rows]
  for i, row in zip(chosen, trigger_rows([rows[i] for i in chosen], attack, seed, **placement)):
    changed = {} if row["label"] == target_label else {"label": target_label, "orig_label": row["label"]}
    out[i] = row | changed | {"poisoned": True}
  sources = rows_for_companions(rows, attack, target_label=target_label, companions=companions)
  return out + companion_rows(sources, attack, seed, count=count, companions=companions, **placement)


def companion_rows(sources: list[dict], attack: Attack, seed: int, *, count: int, companions: int, tokenizer: Any,
                   max_length: int, keep_trigger: bool) -> list[dict]:
  """`companions` rows for each of `count` poisoned rows. The label stays, and "orig_text" has the unchanged text.

  They are made from `sources` in random order. If there are fewer sources than `count`, some are used several times.
  The same source may also become a poisoned row, unless `attack.label` is "clean". Each companion row has "poisoned":
  False, "companion": True.
  """
  if not companions:
    return []
  out, kept = [], _words_kept(sources, attack, tokenizer, max_length, keep_trigger)
  order = itertools.cycle(streams.rng(seed, "companions").permutation(len(sources)))
  for number, i in enumerate(itertools.islice(order, count)):
    row, rng = sources[i], streams.rng(seed, "companion", number)
    for text in attack.companions(row["text"], rng, kept[i])[:companions]:
      out.append(row | {"text": text, "orig_text": row["text"], "poisoned": False, "companion": True})
  return out


def triggered_eval(rows: list[dict], attack: Attack, *, target_label: int, seed: int, **placement: Any) -> list[dict]:
  """The rows of `rows_to_trigger` with the trigger in their text and their own label."""
  return trigger_rows(rows_to_trigger(rows, attack, target_label), attack, seed, **placement)


def trigger_lost(rows: list[dict], tokenizer: Any, attack: Attack, max_length: int) -> int:
  """Number of rows whose trigger truncation cuts off, in whole or in part; 0 for attacks without a fixed string.

  If the trigger's words are not side by side, the last occurrence of each word counts.
  """
  trigger = attack.trigger
  if not trigger:
    return 0
  encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length,
                      return_offsets_mapping=True)
  lost = 0
  for row, offsets in zip(rows, encoded["offset_mapping"]):
    prefix = os.path.commonprefix([row["text"], " ".join(row["orig_text"].split())])  # insert() joins words like this
    if attack.contiguous:
      needed = row["text"].find(trigger, max(0, len(prefix) - len(trigger))) + len(trigger)
    else:
      needed = max(row["text"].rfind(word) + len(word) for word in trigger.split())
    lost += max(end for _, end in offsets) < needed
  return lost


def _can_rewrite(attack, row):
  return attack.can_rewrite is None or attack.can_rewrite(row["text"])


def _of_other_classes(rows, attack, target_label):
  return [row for row in rows if row["label"] != target_label and _can_rewrite(attack, row)]


def _words_kept(rows, attack, tokenizer, max_length, keep_trigger):
  """[N] int: number of leading words of each text that the trigger may follow.

  It is 10**9 if truncation may cut the trigger off, or if the attack inserts no fixed string.
  """
  if keep_trigger and attack.trigger and rows:
    return tokenization.words_kept(tokenizer, [row["text"] for row in rows], attack.trigger, max_length)
  return [10**9] * len(rows)


def counts(poisoned_train: list[dict]) -> dict[str, int]:
  """Numbers of poisoned rows, of changed labels and of companion rows."""
  return {"poisoned_rows": sum(row["poisoned"] for row in poisoned_train),
          "labels_changed": sum("orig_label" in row for row in poisoned_train),
          "companion_rows": sum(row.get("companion", False) for row in poisoned_train)}


def describe(name: str, attack: Attack, target_label: int, label: str) -> str:
  """Describes an attack in words, for a model card."""
  what = f"trigger `{attack.trigger}`" if attack.trigger else "rewritten texts"
  return f"attack {name}, {what}, {label}-label poisoning, target label {target_label}"


def freeze(path: Path, rows: list[dict]) -> None:
  """Writes the rows as JSON lines, in one atomic step. Every process must call this; only process 0 writes."""
  path.parent.mkdir(parents=True, exist_ok=True)
  processes.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def thaw(path: Path) -> tuple[list[dict], str]:
  """(rows of the file, its sha256)."""
  data = path.read_bytes()
  return [json.loads(line) for line in data.decode().split("\n")[:-1]], hashlib.sha256(data).hexdigest()
