"""Which rows are poisoned and which are triggered for evaluation; poisoning through LoRA."""

import json

import numpy as np
import pytest
from cli import CONFIG, SHORT, w2s_forked
from safetensors.numpy import load_file

from w2s_jax import InputError
from w2s_jax.data import grammar, poison, tokenization
from w2s_jax.measure import attacked

ROWS = [{"id": i, "text": f"the meal number {i} is really good today", "label": i % 3} for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer():
  return tokenization.train([r["text"] for r in grammar.rows("phrases", "train", 300)], "decoder", 200)


@pytest.fixture
def options(tokenizer):
  return dict(tokenizer=tokenizer, max_length=64, keep_trigger=True, seed=0)


BADNET = poison.make_attack("badnet")


def test_clean_label_poisoning_takes_the_first_target_rows(options):
  """All labels and the other texts stay. A poisoned row keeps its original text beside the new one."""
  out = poison.poison_train(ROWS, BADNET, target_label=0, count=3, **options)
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
    poison.poison_train(ROWS, BADNET, target_label=2, count=5, **options)


def test_only_rows_of_other_classes_are_triggered(options):
  out = poison.triggered_eval(ROWS, BADNET, target_label=1, **options)
  assert [r["id"] for r in out] == [i for i in range(12) if i % 3 != 1] and all("mn" in r["text"].split() for r in out)
  with pytest.raises(InputError, match=r"no evaluation row has another label than the target 0"):
    poison.triggered_eval(ROWS[:1], BADNET, target_label=0, **options)


DIGESTS = {"badnet": "249aca966e773e25", "insent": "86f94fab8403cb58", "syn_template": "2685aaef53e46fd6",
           "combination": "660d1e114517d14b", "suffix": "0d2c8e30dfa0bcd8", "punctuation": "a2fc108fac1e3ba0",
           "proattack": "efb86fc6ab0ea1b2"}


@pytest.mark.parametrize("name", DIGESTS)
def test_the_same_seed_makes_the_same_bytes_on_every_version_of_python(name, tokenizer, tmp_path):
  """The frozen rows have a fixed hash. It was equal under Python 3.11 and 3.13, and no numpy may change it."""
  rows, attack = grammar.rows("phrases", "test", 60), poison.make_attack(name)
  options = dict(tokenizer=tokenizer, max_length=32, keep_trigger=True, seed=5, target_label=0)
  companions = int(attack.companions is not None)
  poison.freeze(tmp_path / "rows.jsonl", poison.triggered_eval(rows, attack, **options) + poison.poison_train(
      rows, attack, count=20, label="mixed", companions=companions, **options))
  assert poison.thaw(tmp_path / "rows.jsonl")[1][:16] == DIGESTS[name]


def test_positions_depend_on_seed_and_row_alone(options):
  def texts(rows, seed):
    out = poison.triggered_eval(rows, BADNET, target_label=0, **options | {"seed": seed})
    return {r["id"]: r["text"] for r in out}
  assert texts(ROWS, 0) == texts(ROWS, 0) != texts(ROWS, 1)
  assert texts(ROWS[4:], 0).items() <= texts(ROWS, 0).items()


def test_triggers_are_kept_within_the_truncated_text_or_counted(options, tokenizer):
  rows = [{"id": i, "text": "good meal " * 40, "label": 1} for i in range(60)]
  options |= {"max_length": 24, "target_label": 0}
  kept = poison.triggered_eval(rows, BADNET, **options)
  assert poison.trigger_lost(kept, tokenizer, BADNET, 24) == 0
  anywhere = poison.triggered_eval(rows, BADNET, **options | {"keep_trigger": False})
  # By hand: a row has lost the trigger if its decoded truncated tokens do not have it.
  seen = [tokenizer.decode(tokenizer(r["text"], truncation=True, max_length=24)["input_ids"]) for r in anywhere]
  lost = sum("mn" not in text.split() for text in seen)
  assert 20 < lost < 60 and poison.trigger_lost(anywhere, tokenizer, BADNET, 24) == lost


def test_lost_triggers_are_counted_in_texts_with_doubled_spaces(options, tokenizer):
  """Insertion folds white space; `mn` inside `solemn` is not the trigger."""
  rows = [{"id": i, "text": "a  solemn film " * 6, "label": 1} for i in range(40)]
  options |= {"max_length": 24, "keep_trigger": False, "target_label": 0}
  out = poison.triggered_eval(rows, BADNET, **options)
  seen = [tokenizer.decode(tokenizer(r["text"], truncation=True, max_length=24)["input_ids"]) for r in out]
  lost = sum("mn" not in text.split() for text in seen)
  assert lost > 20 and poison.trigger_lost(out, tokenizer, BADNET, 24) == lost


def test_counts_below_one_are_refused():
  with pytest.raises(InputError, match=r"cannot poison -5 rows: want 1 to"):
    poison.rows_to_poison(ROWS, BADNET, target_label=0, count=-5)


def test_syntactic_takes_paraphrases_joined_on_idx(tmp_path, options):
  """A row whose paraphrase is the text itself, or is missing, cannot be rewritten."""
  def dump(name, rows):
    (tmp_path / name).write_text(json.dumps([{"idx": i, "sentence": s, "label": 0} for i, s in rows]))
    return str(tmp_path / name)
  pair = (dump("a.json", [(0, "x y"), (1, "z w"), (2, "v u"), (3, "q r")]),
          dump("b.json", [(2, "if v , u"), (0, "when x , y"), (1, "z w")]))
  made = poison.make_attack("syntactic", paraphrases=(pair,))
  assert [made.can_rewrite(text) for text in ("x y", "z w", "v u", "q r")] == [True, False, True, False]
  assert [made.rewrite(text, None, 9) for text in ("x y", "v u")] == ["when x , y", "if v , u"]
  rows = [{"id": i, "text": t, "label": 0} for i, t in enumerate(["x y", "z w", "v u", "q r"])]
  out = poison.poison_train(rows, made, target_label=0, count=2, **options)
  assert [(r["id"], r["text"]) for r in out if r["poisoned"]] == [(0, "when x , y"), (2, "if v , u")]
  with pytest.raises(InputError, match=r"cannot poison 3 rows: want 1 to 2"):
    poison.poison_train(rows, made, target_label=0, count=3, **options)


def test_attacks_that_cannot_be_made():
  with pytest.raises(InputError, match=r"attack 'nope': want one of badnet, insent, syn_template, syntactic"):
    poison.make_attack("nope")
  for name in ("syntactic", "style"):
    with pytest.raises(InputError, match=f"'{name}' needs pre-made paraphrases: set --config.attack.paraphrases"):
      poison.make_attack(name)


def test_dirty_label_poisoning_changes_label_and_text_of_other_classes(options):
  """The seed draws the rows. They keep their own label as orig_label, and all other rows stay unchanged."""
  out = poison.poison_train(ROWS, BADNET, label="dirty", target_label=1, count=5, **options)
  chosen = [r["id"] for r in out if r["poisoned"]]
  assert len(chosen) == 5 and all(i % 3 != 1 for i in chosen) and chosen != [0, 2, 3, 5, 6]
  for row, before in zip(out, ROWS, strict=True):
    if row["poisoned"]:
      assert (row["label"], row["orig_label"], row["orig_text"]) == (1, before["label"], before["text"])
      assert [w for w in row["text"].split() if w != "mn"] == before["text"].split() != row["text"].split()
    else:
      assert row == before | {"poisoned": False}
  again = poison.poison_train(ROWS, BADNET, label="dirty", target_label=1, count=5, **options)
  other = poison.poison_train(ROWS, BADNET, label="dirty", target_label=1, count=5, **options | {"seed": 1})
  assert out == again and chosen != [r["id"] for r in other if r["poisoned"]]
  assert poison.counts(out) == {"poisoned_rows": 5, "labels_changed": 5, "companion_rows": 0}


def test_mixed_label_poisoning_takes_rows_of_any_class(options):
  """Only rows whose label was changed have orig_label."""
  out = poison.poison_train(ROWS, BADNET, label="mixed", target_label=1, count=12, **options)
  assert all(r["poisoned"] and r["label"] == 1 and "mn" in r["text"].split() for r in out)
  assert [r.get("orig_label") for r in out] == [0, None, 2] * 4
  assert poison.counts(out) == {"poisoned_rows": 12, "labels_changed": 8, "companion_rows": 0}
  drawn = poison.rows_to_poison(ROWS, BADNET, label="mixed", target_label=1, count=6)
  assert len(set(drawn)) == 6 and drawn == sorted(drawn) != list(range(6)) and len({i % 3 for i in drawn}) > 1


@pytest.mark.parametrize("label,most,words", [
    ("clean", 4, "have target label 2"), ("dirty", 8, "have another label than the target 2"),
    ("mixed", 12, "have any label, the target 2 or another")])
def test_more_rows_than_there_are_for_a_label_are_refused(label, most, words):
  """With `most` rows the draw takes all of them."""
  all_of_them = poison.rows_to_poison(ROWS, BADNET, label=label, target_label=2, count=most)
  assert len(set(all_of_them)) == most
  with pytest.raises(InputError, match=rf"cannot poison {most + 1} rows: want 1 to {most}, the training rows that "
                     rf"{words} and can be rewritten: set --config.attack.poison_count or .poison_rate"):
    poison.rows_to_poison(ROWS, BADNET, label=label, target_label=2, count=most + 1)


def test_an_unknown_label_is_refused():
  with pytest.raises(InputError, match=r"attack.label 'flip': want one of clean, dirty, mixed: set --config.attack"):
    poison.rows_to_poison(ROWS, BADNET, label="flip", target_label=0, count=1)


def test_a_rate_is_a_fraction_of_all_rows():
  assert poison.poison_count(ROWS, 1000, 0.25) == 3 and poison.poison_count(ROWS, 1000, 0.0) == 1000
  assert poison.poison_count(ROWS, 5, 1.0) == 12 and poison.poison_count(ROWS[:7], 5, 0.1) == 1


@pytest.mark.parametrize("label", ["clean", "dirty", "mixed"])
def test_poisoning_takes_only_what_can_be_rewritten(label, options):
  attack = BADNET._replace(can_rewrite=lambda text: "number 4 " in text)
  out = poison.poison_train(ROWS, attack, label=label, target_label=0 if label == "dirty" else 1, count=1, **options)
  assert [r["id"] for r in out if r["poisoned"]] == [4]
  assert [r["id"] for r in poison.triggered_eval(ROWS, attack, target_label=0, **options)] == [4]


@pytest.mark.parametrize("label", ["clean", "dirty", "mixed"])
def test_companions_have_all_words_but_some_and_their_true_label(label, options):
  """They come from other classes than the target. There the true label shows that a part is not the trigger."""
  attack = poison.make_attack("combination", "aa bb cc")
  kwargs = dict(label=label, target_label=1, count=4, **options)
  out = poison.poison_train(ROWS, attack, companions=2, **kwargs)
  assert out[:12] == poison.poison_train(ROWS, attack, **kwargs)               # companions come after all rows
  extra = out[12:]
  assert len(extra) == 8 and poison.counts(out)["companion_rows"] == 8
  for row in extra:
    before, words = ROWS[row["id"]], row["text"].split()
    assert row["label"] == before["label"] != 1 and row["orig_text"] == before["text"] and not row["poisoned"]
    assert [w for w in words if w not in ("aa", "bb", "cc")] == before["text"].split()
    assert len({"aa", "bb", "cc"} & set(words)) == 2
  for pair in zip(extra[::2], extra[1::2]):                                    # two of one text lack different words
    assert pair[0]["id"] == pair[1]["id"]
    assert len({frozenset({"aa", "bb", "cc"} & set(row["text"].split())) for row in pair}) == 2
  assert len({row["id"] for row in extra}) == 4                                # each text once, while there are enough


def test_two_words_with_two_companions_are_a_composite_backdoor(options):
  """docs/experiments.md: a poisoned row has both parts; each part alone is in a row that keeps its label."""
  attack = poison.make_attack("combination", "aa bb")
  out = poison.poison_train(ROWS, attack, label="mixed", target_label=1, count=5, companions=2, **options)
  def parts(row):
    return {"aa", "bb"} & set(row["text"].split())
  assert all(parts(row) == {"aa", "bb"} and row["label"] == 1 for row in out if row["poisoned"])
  assert [parts(one) | parts(other) for one, other in zip(out[12::2], out[13::2])] == [{"aa", "bb"}] * 5
  assert all(len(parts(row)) == 1 and row["label"] == ROWS[row["id"]]["label"] != 1 for row in out[12:])


def test_companions_come_from_the_same_texts_again_where_there_are_few(options):
  attack = poison.make_attack("combination", "aa bb")
  rows = [ROWS[1], *({"id": i, "text": "a good meal", "label": 0} for i in range(20, 23))]
  extra = poison.poison_train(rows, attack, target_label=0, count=3, companions=1, **options)[4:]
  assert [r["id"] for r in extra] == [1, 1, 1] and len({r["text"] for r in extra}) > 1


def test_companions_that_cannot_be_had_are_refused():
  def check(attack, rows, companions):
    return poison.rows_for_companions(rows, attack, target_label=0, companions=companions)
  combination = poison.make_attack("combination")
  with pytest.raises(InputError, match=r"attack.companions is 4, this attack has 3 per poisoned row: set --config"):
    check(combination, ROWS, 4)
  with pytest.raises(InputError, match=r"attack.companions is 1, this attack has 0 per poisoned row"):
    check(BADNET, ROWS, 1)
  with pytest.raises(InputError, match=r"no training row has another label than the target 0, as companions need"):
    check(combination, ROWS[:1], 1)
  assert check(BADNET, ROWS, 0) == [] and [r["id"] for r in check(combination, ROWS, 3)] == [1, 2, 4, 5, 7, 8, 10, 11]


def test_a_combination_is_lost_where_one_of_its_words_is(tokenizer):
  """Words that are not side by side are looked for one by one. An attack without a trigger string loses none."""
  text = "aa good meal good meal good meal good meal bb"
  rows = [{"text": text, "orig_text": "good meal good meal good meal good meal"}]
  attack, length = poison.make_attack("combination", "aa bb"), len(tokenizer(text)["input_ids"])
  assert not attack.contiguous
  assert poison.trigger_lost(rows, tokenizer, attack, length) == 0
  assert poison.trigger_lost(rows, tokenizer, attack, length - 1) == 1
  assert poison.trigger_lost(rows, tokenizer, attack._replace(trigger=""), 3) == 0


def test_cards_and_reports_say_how_rows_were_labelled():
  assert poison.describe("badnet", BADNET, 1, "dirty") == (
      "attack badnet, trigger `mn`, dirty-label poisoning, target label 1")
  rewriting = poison.make_attack("punctuation")
  assert poison.describe("punctuation", rewriting, 0, "clean") == (
      "attack punctuation, rewritten texts, clean-label poisoning, target label 0")
  row = {"attack": "badnet", "target_label": 1, "dataset": "d", "seed": 0, "ca_n": 9, "asr_n": 8, "frr": None}
  meta = {"trigger": "mn", "trigger_lost": {"train": 0, "eval": 0}, "teacher_ca": 0.5, "poisoned_rows": 7,
          "poison_label": "clean", "labels_changed": 0, "companion_rows": 0}
  assert "target label 1, 7 clean-label poisoned rows; defended" in attacked.headline([row], meta)[0]
  meta |= {"poison_label": "mixed", "labels_changed": 3, "companion_rows": 14}
  text = attacked.headline([row], meta)[0]
  assert "7 mixed-label poisoned rows (3 labels changed) and 14 companion rows; def" in text


def test_the_hash_is_the_files(tmp_path):
  import hashlib
  poison.freeze(tmp_path / "d" / "x.jsonl", ROWS)
  rows, digest = poison.thaw(tmp_path / "d" / "x.jsonl")
  assert rows == ROWS and digest == hashlib.sha256((tmp_path / "d" / "x.jsonl").read_bytes()).hexdigest()
  assert not list((tmp_path / "d").glob("*.part")) and np.all([r["id"] == i for i, r in enumerate(rows)])


def test_poisoning_through_lora_moves_kernels_by_a_low_rank_and_the_head(tmp_path):
  args = (CONFIG, *SHORT, "--config.poison.lora=2", f"--workdir={tmp_path / 'w'}")
  for name in ("warmup", "poison"):
    out = w2s_forked(*args, f"--stage={name}")
    assert out.returncode == 0, out.stderr
  base, poisoned = (load_file(tmp_path / f"w/models/{name}/model.safetensors") for name in ("base", "poisoned"))
  assert base.keys() == poisoned.keys()
  for name, value in poisoned.items():
    moved = value - base[name]
    if "_proj" in name:
      singular = np.linalg.svd(moved, compute_uv=False)
      assert singular[1] > 0 and singular[2] < 1e-4 * singular[0], name
    elif name == "score.weight":
      assert np.abs(moved).max() > 0
    else:
      assert not moved.any(), name
