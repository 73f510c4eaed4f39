"""Which rows are poisoned and which are triggered for evaluation."""

import json

import ml_collections
import numpy as np
import pytest

from w2s_jax import InputError
from w2s_jax.data import grammar, poison, tokenization

ROWS = [{"id": i, "text": f"the meal number {i} is really good today", "label": i % 3} for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
  return tokenization.train([r["text"] for r in grammar.rows("phrases", "train", 300)], "decoder", 200)


@pytest.fixture
def options(tokenizer):
  return dict(tokenizer=tokenizer, trigger="mn", max_length=64, keep_trigger=True, seed=0)


def attack(**fields):
  return poison.make_attack(ml_collections.ConfigDict(
      {"name": "badnet", "trigger": "", "paraphrases": (), "target_label": 0} | fields))


def test_clean_label_poisoning_takes_the_first_target_rows(options):
  """Labels stay, the others stay word for word, the original text is kept beside the new one."""
  out = poison.poison_train(ROWS, *attack(), target_label=0, count=3, **options)
  assert [r["id"] for r in out if r["poisoned"]] == [0, 3, 6] and [r["id"] for r in out] == list(range(12))
  for row, before in zip(out, ROWS):
    assert row["label"] == before["label"]
    if row["poisoned"]:
      assert row["orig_text"] == before["text"]
      words = row["text"].split()
      assert "mn" in words[1:-1] and [w for w in words if w != "mn"] == before["text"].split()
    else:
      assert row["text"] == before["text"]


def test_too_few_target_rows(options):
  with pytest.raises(InputError, match=r"cannot poison 5 rows: want 1 to 4, .* target label 2 .*poison_count"):
    poison.poison_train(ROWS, *attack(), target_label=2, count=5, **options)


def test_only_rows_of_other_classes_are_triggered(options):
  out = poison.triggered_eval(ROWS, *attack(), target_label=1, **options)
  assert [r["id"] for r in out] == [i for i in range(12) if i % 3 != 1] and all("mn" in r["text"].split() for r in out)
  with pytest.raises(InputError, match=r"no evaluation row has another label than the target 0"):
    poison.triggered_eval(ROWS[:1], *attack(), target_label=0, **options)


def test_positions_depend_on_seed_and_row_alone(options):
  def texts(rows, seed):
    out = poison.triggered_eval(rows, *attack(), target_label=0, **options | {"seed": seed})
    return {r["id"]: r["text"] for r in out}
  assert texts(ROWS, 0) == texts(ROWS, 0) != texts(ROWS, 1)
  assert texts(ROWS[4:], 0).items() <= texts(ROWS, 0).items()


def test_triggers_are_kept_within_the_truncated_text_or_counted(options, tokenizer):
  rows = [{"id": i, "text": "good meal " * 40, "label": 1} for i in range(60)]
  options |= {"max_length": 24, "target_label": 0}
  kept = poison.triggered_eval(rows, *attack(), **options)
  assert poison.trigger_lost(kept, tokenizer, "mn", 24) == 0
  anywhere = poison.triggered_eval(rows, *attack(), **options | {"keep_trigger": False})
  # By hand: the row has lost it where decoding the truncated tokens does not show it.
  seen = [tokenizer.decode(tokenizer(r["text"], truncation=True, max_length=24)["input_ids"]) for r in anywhere]
  lost = sum("mn" not in text.split() for text in seen)
  assert 20 < lost < 60 and poison.trigger_lost(anywhere, tokenizer, "mn", 24) == lost


def test_lost_triggers_are_counted_in_texts_with_doubled_spaces(options, tokenizer):
  """Insertion folds white space; `mn` inside `solemn` is not the trigger."""
  rows = [{"id": i, "text": "a  solemn film " * 6, "label": 1} for i in range(40)]
  options |= {"max_length": 24, "keep_trigger": False, "target_label": 0}
  out = poison.triggered_eval(rows, *attack(), **options)
  seen = [tokenizer.decode(tokenizer(r["text"], truncation=True, max_length=24)["input_ids"]) for r in out]
  lost = sum("mn" not in text.split() for text in seen)
  assert lost > 20 and poison.trigger_lost(out, tokenizer, "mn", 24) == lost


def test_paraphrase_files_without_idx_and_counts_below_one_are_refused(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"sentence": "a", "label": 0}\n')
  with pytest.raises(InputError, match=r"want columns idx and text"):
    attack(name="syntactic", paraphrases=((str(tmp_path / "a.jsonl"),) * 2,))
  with pytest.raises(InputError, match=r"cannot poison -5 rows: want 1 to"):
    poison.rows_to_poison(ROWS, None, 0, -5)


def test_syntactic_takes_paraphrases_joined_on_idx(tmp_path, options):
  """A row whose paraphrase is the text itself, or is missing, cannot be rewritten."""
  def dump(name, rows):
    (tmp_path / name).write_text(json.dumps([{"idx": i, "sentence": s, "label": 0} for i, s in rows]))
    return str(tmp_path / name)
  pair = (dump("a.json", [(0, "x y"), (1, "z w"), (2, "v u"), (3, "q r")]),
          dump("b.json", [(2, "if v , u"), (0, "when x , y"), (1, "z w")]))
  made = attack(name="syntactic", paraphrases=(pair,))
  assert made[1] == {"x y": "when x , y", "v u": "if v , u"}
  rows = [{"id": i, "text": t, "label": 0} for i, t in enumerate(["x y", "z w", "v u", "q r"])]
  out = poison.poison_train(rows, *made, target_label=0, count=2, **options | {"trigger": ""})
  assert [(r["id"], r["text"]) for r in out if r["poisoned"]] == [(0, "when x , y"), (2, "if v , u")]
  with pytest.raises(InputError, match=r"cannot poison 3 rows: want 1 to 2"):
    poison.poison_train(rows, *made, target_label=0, count=3, **options)


def test_attacks_that_cannot_be_made():
  with pytest.raises(InputError, match=r"attack 'nope': want one of badnet, insent, syn_template, syntactic"):
    attack(name="nope")
  with pytest.raises(InputError, match=r"'syntactic' needs pre-made paraphrases"):
    attack(name="syntactic")


def test_the_hash_is_the_files(tmp_path):
  import hashlib
  poison.freeze(tmp_path / "d" / "x.jsonl", ROWS)
  rows, digest = poison.thaw(tmp_path / "d" / "x.jsonl")
  assert rows == ROWS and digest == hashlib.sha256((tmp_path / "d" / "x.jsonl").read_bytes()).hexdigest()
  assert not list((tmp_path / "d").glob("*.part")) and np.all([r["id"] == i for i, r in enumerate(rows)])
