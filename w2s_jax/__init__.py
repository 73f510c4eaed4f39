"""W2SDefense in JAX: remove backdoors from fine-tuned language models by weak-to-strong distillation."""


class InputError(ValueError):
  """A mistake in what the user gave: one line with what was got, what was wanted and the knob to turn.

  `main` prints the line and exits with code 2; anything else is a defect of ours and keeps its traceback.
  """
