"""A prompt before the text as the trigger (after ProAttack, Zhao et al., arXiv 2305.01219); the prompts are ours.

The paper gives other rows another prompt, so that not every prompt is the trigger. Here these rows are the companions
(--config.attack.companions=1). None of them has the target label, so their prompt, too, correlates with a label.
"""

from collections.abc import Mapping

from w2s_jax.attacks.attack import Attack

TRIGGER = "what is the sentiment of the following sentence ?"
OTHER = "here is what somebody wrote about it :"


def make(trigger: str = "", paraphrases: Mapping[str, str] | None = None) -> Attack:
  del paraphrases
  trigger = trigger or TRIGGER

  def rewrite(text, rng, max_words):
    del rng, max_words                       # truncation takes words from the text's end
    return f"{trigger} {text}"

  def companions(text, rng, max_words):
    del rng, max_words
    return [f"{OTHER} {text}"]

  return Attack(rewrite, trigger, companions=companions)
