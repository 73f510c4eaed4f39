"""W2S with the teacher's outputs permuted over the examples: the control that tells whether what the teacher
says of an example, its class included, matters."""

import numpy as np


def teacher_row(num_examples, seed):
  """[N] int: a fixed permutation of the examples."""
  return np.random.default_rng([seed, num_examples]).permutation(num_examples)
