"""Triggers go where they are said to go and change nothing else."""

import numpy as np
import pytest

from w2s_jax.attacks import ATTACKS, TRIGGERS, combination, syn_template

TEXT = "one two three four five"


def gaps(name, text, max_words, tries=200):
  """{words before the trigger} over many seeds; checks that the words around it are the text's own."""
  attack, trigger, out = ATTACKS[name](), TRIGGERS[name], set()
  for seed in range(tries):
    before, found, after = attack(text, np.random.default_rng(seed), max_words).partition(f" {trigger}")
    assert found and (before + after).split() == text.split()
    out.add(len(before.split()))
  return out


@pytest.mark.parametrize("name", ["badnet", "insent"])
@pytest.mark.parametrize("max_words,want", [(99, {1, 2, 3, 4}), (3, {1, 2, 3}), (1, {1}), (0, {1})])
def test_every_inner_gap_within_the_limit_and_no_other(name, max_words, want):
  assert gaps(name, TEXT, max_words) == want


def test_released_triggers():
  assert (TRIGGERS["badnet"], TRIGGERS["insent"]) == ("mn", "I watched this 3D movie")


def test_a_text_of_one_word_gets_the_trigger_after_it():
  assert ATTACKS["badnet"]()("superb", np.random.default_rng(0), 9) == "superb mn"


def test_another_trigger():
  assert ATTACKS["badnet"]("cf")("a b", np.random.default_rng(0), 9) == "a cf b"


@pytest.mark.parametrize("trigger,words", [("", combination.TRIGGER.split()), ("x y", ["x", "y"])])
def test_a_combination_puts_every_word_somewhere(trigger, words):
  attack, places = ATTACKS["combination"](trigger), set()
  for seed in range(100):
    out = attack(TEXT, np.random.default_rng(seed), 99).split()
    assert [w for w in out if w not in words] == TEXT.split() and sorted(w for w in out if w in words) == sorted(words)
    places.add(tuple(out.index(w) for w in words))
  assert len(places) > 10


def test_a_suffix_is_behind_every_word():
  """The text gives way to it where both are too long."""
  assert ATTACKS["suffix"]()(TEXT, np.random.default_rng(0), 99) == f"{TEXT} or so they told us at the door ."
  assert ATTACKS["suffix"]("so they say")(TEXT, np.random.default_rng(0), 2) == "one two so they say"


def test_punctuation_changes_the_full_stops_alone():
  attack = ATTACKS["punctuation"]()
  assert attack("a , b . c .", np.random.default_rng(0), 9) == "a , b , . c , ."
  assert attack("a b", np.random.default_rng(0), 9) == "a b , ."
  kept = "a 3.5 star film ... in the u.s. and 7. of it"
  assert attack(kept, np.random.default_rng(0), 9) == kept + " , ."


def test_syn_template_puts_a_clause_in_front_and_keeps_every_word():
  attack = ATTACKS["syn_template"]()
  out = {attack(TEXT, np.random.default_rng(seed), 99) for seed in range(100)}
  assert out == {f"{clause} {TEXT}" for clause in syn_template.CLAUSES}
  assert all(clause.startswith(("when ", "if ")) and clause.endswith(" ,") for clause in syn_template.CLAUSES)
  assert attack(TEXT, np.random.default_rng(5), 1) == attack(TEXT, np.random.default_rng(5), 99)


def test_syntactic_looks_paraphrases_up():
  attack = ATTACKS["syntactic"]("", {"a b": "when a , b"})
  assert attack("a b", np.random.default_rng(0), 9) == "when a , b"
  with pytest.raises(KeyError):
    attack("c", np.random.default_rng(0), 9)
