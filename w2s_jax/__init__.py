"""W2SDefense in JAX: remove backdoors from fine-tuned language models by weak-to-strong distillation."""


class InputError(ValueError):
  """A mistake in the user's input. Its message is one line: what was got, what was wanted and the flag to set.

  `main` prints the line and exits with code 2. Any other exception is a defect of ours and keeps its traceback.
  """
