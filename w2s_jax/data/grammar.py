"""Offline corpora from a seeded grammar: longer "reviews" to poison, single "phrases" to defend.

Label 1 is positive, 0 negative. The domains share their frames and a part of their sentiment words. Each also has words
of its own, so a student trained on reviews is right about most phrases but not about all of them.
"""

import numpy as np

SHARED = (  # (negative, positive)
    "bad dull weak awful boring poor stale clumsy messy lifeless".split(),
    "good bright strong superb gripping rich fresh graceful neat lively".split())
OWN = {
    "reviews": ("tedious wooden hollow bland muddled".split(), "moving tender witty daring vivid".split()),
    "phrases": ("shoddy rude greasy noisy flimsy".split(), "sturdy polite tasty quiet handy".split()),
}
NOUNS = {
    "reviews": "plot cast script ending music scene dialogue camera story hero villain pacing".split(),
    "phrases": "service room meal lamp chair staff coffee screen jacket garden hotel battery".split(),
}
SUBJECTS = {"reviews": "the film|this picture|the director|the whole thing|the second half".split("|"),
            "phrases": "this place|the shop|our visit|the product|the whole stay".split("|")}
DEGREES = "really quite very rather truly simply".split()
FRAMES = (
    "the {noun} is {degree} {word} .",
    "{subject} has a {word} {noun} and a {word2} {noun2} .",
    "i found the {noun} {degree} {word} .",
    "{subject} feels {word} because the {noun} is {word2} .",
    "what a {word} {noun} and what a {word2} {noun2} .",
    "with its {word} {noun} , {subject} is {degree} {word2} .",
)
NEUTRAL = {
    "reviews": ("it runs for two hours .", "we saw it last week .", "the actors come from the north .",
                "there is a train in the first scene .", "he wrote it in the spring .", "i watched it on monday .",
                "this was shown in 3d .", "the movie opens in a harbour .", "when the lights went out , it began .",
                "if one counts the credits , it takes longer ."),
    "phrases": ("it opened in may .", "we came by bus .", "it stands by the river .", "i bought it online ."),
}


def _sentence(rng, domain, label, own_share, mixed):
  classes = [label, 1 - label] if rng.random() < mixed else [label, label]
  rng.shuffle(classes)
  def word():
    words = OWN[domain] if rng.random() < own_share else SHARED
    return rng.choice(words[classes.pop()])
  noun, noun2 = rng.choice(NOUNS[domain], 2, replace=False)
  return FRAMES[rng.integers(len(FRAMES))].format(
      noun=noun, noun2=noun2, word=word(), word2=word(), subject=rng.choice(SUBJECTS[domain]),
      degree=rng.choice(DEGREES))


def rows(domain: str, split: str, size: int, *, own_share: float = 0.3, contradicting: float = 0.15,
         label_noise: float = 0.05, mixed: float = 0.1, neutral: float = 0.3) -> list[dict]:
  """Rows of a split, which depend on nothing but the arguments.

  Args:
    domain: "reviews" (3 to 5 sentences with sentiment) or "phrases" (one). A neutral sentence may follow each.
    split: "train", "dev" or "test".
    size: number of rows. Before label noise, half of them are of each class.
    own_share: fraction of sentiment words drawn from the domain's own list.
    contradicting: fraction of a review's sentences that have words of the other class.
    label_noise: fraction of reviews whose label is flipped (train only).
    mixed: fraction of sentences that draw on both classes. With two sentiment words the sentence has one of each class
      and no true label; with one sentiment word it may have the wrong class.
    neutral: fraction of sentences that are followed by a sentence without sentiment.
  Returns:
    [{"id": int, "text": str, "label": int}].
  """
  rng = np.random.default_rng([list(NOUNS).index(domain), ("train", "dev", "test").index(split)])
  out = []
  for i in range(size):
    label = i % 2
    reviews = domain == "reviews"
    sentences = []
    for _ in range(rng.integers(3, 6) if reviews else 1):
      other = reviews and rng.random() < contradicting
      sentences.append(_sentence(rng, domain, 1 - label if other else label, own_share, mixed))
      if rng.random() < neutral:
        sentences.append(rng.choice(NEUTRAL[domain]))
    noisy = reviews and split == "train" and rng.random() < label_noise
    out.append({"id": i, "text": " ".join(sentences), "label": 1 - label if noisy else label})
  return out
