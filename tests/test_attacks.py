"""Triggers go where they are said to go and change nothing else."""

import numpy as np
import pytest

from w2s_jax.attacks import ATTACKS, combination, syn_template

TEXT = "one two three four five"


def gaps(name, text, max_words, tries=200):
  """{number of words before the trigger} over many seeds. Asserts that the other words are the text's own."""
  attack, out = ATTACKS[name](), set()
  for seed in range(tries):
    before, found, after = attack.rewrite(text, np.random.default_rng(seed), max_words).partition(f" {attack.trigger}")
    assert found and (before + after).split() == text.split()
    out.add(len(before.split()))
  return out


@pytest.mark.parametrize("name", ["badnet", "insent"])
@pytest.mark.parametrize("max_words,want", [(99, {1, 2, 3, 4}), (3, {1, 2, 3}), (1, {1}), (0, {1})])
def test_every_inner_gap_within_the_limit_and_no_other(name, max_words, want):
  assert gaps(name, TEXT, max_words) == want


def test_released_triggers():
  assert (ATTACKS["badnet"]().trigger, ATTACKS["insent"]().trigger) == ("mn", "I watched this 3D movie")


def test_a_text_of_one_word_gets_the_trigger_after_it():
  assert ATTACKS["badnet"]().rewrite("superb", np.random.default_rng(0), 9) == "superb mn"


def test_another_trigger():
  assert ATTACKS["badnet"]("cf").rewrite("a b", np.random.default_rng(0), 9) == "a cf b"


@pytest.mark.parametrize("trigger,words", [("", combination.TRIGGER.split()), ("x y", ["x", "y"])])
def test_a_combination_puts_every_word_somewhere(trigger, words):
  attack, places = ATTACKS["combination"](trigger).rewrite, set()
  for seed in range(100):
    out = attack(TEXT, np.random.default_rng(seed), 99).split()
    assert [w for w in out if w not in words] == TEXT.split() and sorted(w for w in out if w in words) == sorted(words)
    places.add(tuple(out.index(w) for w in words))
  assert len(places) > 10


def test_a_suffix_is_behind_every_word():
  """A text that is too long loses its own last words, not the suffix."""
  assert ATTACKS["suffix"]().rewrite(TEXT, np.random.default_rng(0), 99) == f"{TEXT} or so they told us at the door ."
  assert ATTACKS["suffix"]("so they say").rewrite(TEXT, np.random.default_rng(0), 2) == "one two so they say"


def test_a_prompt_is_before_every_word_and_its_companion_has_another():
  attack = ATTACKS["proattack"]("tell me :")
  assert attack.rewrite(TEXT, np.random.default_rng(0), 2) == f"tell me : {TEXT}"
  other, = attack.companions(TEXT, np.random.default_rng(0), 2)
  assert other.endswith(f" : {TEXT}") and "tell me" not in other


def test_punctuation_changes_the_full_stops_alone():
  attack = ATTACKS["punctuation"]().rewrite
  assert attack("a , b . c .", np.random.default_rng(0), 9) == "a , b , . c , ."
  assert attack("a b", np.random.default_rng(0), 9) == "a b , ."
  kept = "a 3.5 star film ... in the u.s. and 7. of it"
  assert attack(kept, np.random.default_rng(0), 9) == kept + " , ."


def test_syn_template_puts_a_clause_in_front_and_keeps_every_word():
  attack = ATTACKS["syn_template"]().rewrite
  out = {attack(TEXT, np.random.default_rng(seed), 99) for seed in range(100)}
  assert out == {f"{clause} {TEXT}" for clause in syn_template.CLAUSES}
  assert all(clause.startswith(("when ", "if ")) and clause.endswith(" ,") for clause in syn_template.CLAUSES)
  assert attack(TEXT, np.random.default_rng(5), 1) == attack(TEXT, np.random.default_rng(5), 99)


@pytest.mark.parametrize("name", ["syntactic", "style"])
def test_paraphrases_are_looked_up(name):
  attack = ATTACKS[name]("", {"a b": "when a , b"})
  assert attack.rewrite("a b", np.random.default_rng(0), 9) == "when a , b"
  assert attack.can_rewrite(" a b ") and attack.rewrite(" a b ", np.random.default_rng(0), 9) == "when a , b"
  with pytest.raises(KeyError):
    attack.rewrite("c", np.random.default_rng(0), 9)
  assert attack.can_rewrite("a b") is True and attack.can_rewrite("c") is False


def test_what_the_records_say():
  """Trigger, whether its words are side by side, whether some texts cannot be rewritten, whether it has companions."""
  facts = {name: (a.trigger, a.contiguous, a.can_rewrite is not None, a.companions is not None)
           for name, make in ATTACKS.items() for a in [make("", {})]}
  assert facts == {
      "badnet": ("mn", True, False, False),
      "insent": ("I watched this 3D movie", True, False, False),
      "syn_template": ("", True, False, False),
      "syntactic": ("", True, True, False),
      "style": ("", True, True, False),
      "combination": ("friends weekend store", False, False, True),
      "suffix": ("or so they told us at the door .", True, False, False),
      "punctuation": ("", True, False, False),
      "proattack": ("what is the sentiment of the following sentence ?", True, False, True),
      "embedding": ("mn", True, False, False),
  }
  assert [ATTACKS[name]("x y").trigger for name in ("badnet", "insent", "combination", "suffix", "proattack")
          ] == ["x y"] * 5
  assert ATTACKS["combination"]("alone").companions is None


def test_each_companion_of_a_combination_lacks_one_word():
  """The companions come in random order, and each has the other two words."""
  companions, words, first = ATTACKS["combination"]("x y z").companions, {"x", "y", "z"}, set()
  for seed in range(50):
    out = [text.split() for text in companions(TEXT, np.random.default_rng(seed), 99)]
    assert all([w for w in text if w not in words] == TEXT.split() for text in out)
    lacking = [words - set(text) for text in out]
    assert sorted(map(list, lacking)) == [["x"], ["y"], ["z"]] and all(len(text) == 7 for text in out)
    first.add(*lacking[0])
  assert first == words
  assert companions("one two", np.random.default_rng(0), 0)[0].startswith("one ")
