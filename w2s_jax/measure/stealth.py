"""How much an attack changes the test texts: their length, their words, their perplexity.

OpenBackdoor (Cui et al., arXiv 2206.08514) measures how far the perplexity and the grammar errors of poisoned texts
rise, and how similar the texts stay under a sentence encoder. We measure what needs no further model: the length, the
words that differ, and the perplexity where the run has ONION's language model.
"""

from typing import Any

import numpy as np

from w2s_jax.defenses import DEFENSES, onion

ONION = "onion"                     # the defense whose language model gives the perplexities


def reading(run: Any) -> dict[str, float | None]:
  """The measures of `of_rows` for the run's triggered rows; the perplexities need `onion` among its defenses."""
  rows = run.rows["triggered"]
  if ONION not in run.config.defenses:
    return of_rows(rows)
  perplexity = onion.perplexity(run.suspect(DEFENSES[ONION]), run.config.defense, run.defend_seeds[0])
  return of_rows(rows, *(perplexity([row[key] for row in rows]) for key in ("orig_text", "text")))


def of_rows(rows: list[dict], clean: np.ndarray | None = None, triggered: np.ndarray | None = None
            ) -> dict[str, float | None]:
  """The mean change from "orig_text" to "text" over N rows; words are what white space separates.

  Args:
    clean, triggered: [N] perplexities of the two texts; None: they are not known.
  Returns:
    "length_ratio": mean over the rows of words in "text" / words in "orig_text".
    "edit_distance": mean `edit_distance`, in words.
    "perplexity_ratio": geometric mean of each row's triggered over its clean perplexity; None without perplexities.
  """
  pairs = [(row["orig_text"].split(), row["text"].split()) for row in rows]
  ratio = None if clean is None else float(np.exp(np.mean(np.log(triggered) - np.log(clean))))
  return {"length_ratio": float(np.mean([len(after) / len(before) for before, after in pairs])),
          "edit_distance": float(np.mean([edit_distance(before, after) for before, after in pairs])),
          "perplexity_ratio": ratio}


def edit_distance(before: list[str], after: list[str]) -> int:
  """Levenshtein's distance: the least number of words to insert, delete or replace to make `after` from `before`."""
  words, steps = np.array(after, str), np.arange(len(after) + 1)
  distances = steps                               # from no word of `before` to the first 0, 1, ... words of `after`
  for word in before:
    kept_or_replaced = distances[:-1] + (words != word)
    least = np.minimum(distances + 1, np.append(distances[0] + 1, kept_or_replaced))
    distances = np.minimum.accumulate(least - steps) + steps               # insertions, along the row
  return int(distances[-1])
