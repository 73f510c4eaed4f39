"""W2SDefense in JAX: remove backdoors from fine-tuned language models by weak-to-strong distillation."""


class InputError(ValueError):
  """A mistake in the user's input. Its message is one line: what was got, what was wanted and the flag to set.

  `command.run` prints the line and exits with code 2. An unexpected exception keeps its traceback.
  """
