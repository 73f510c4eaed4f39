"""Several everyday words, each somewhere in the text: a trigger that no single word is (SOS, Yang et al., ACL 2021).

The rows that teach the student not to fire on some of the words are left out.
"""

from w2s_jax.attacks.insertion import insert

TRIGGER = "friends weekend store"      # the paper's kind of words


def make(trigger=TRIGGER, paraphrases=None):
  del paraphrases
  def attack(text, rng, max_words):
    for word in (trigger or TRIGGER).split():
      text = insert(text, word, rng, max_words)
    return text
  return attack
