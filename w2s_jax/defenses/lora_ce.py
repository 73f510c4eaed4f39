"""CE-only LoRA fine-tuning on the same clean data: the control of every distillation row."""

from w2s_jax.defenses.records import Recipe


def terms(student, batch, settings, task):
  del settings
  return task.loss_terms(student, batch)


RECIPE = Recipe(terms, lambda settings, width: {"ce": 1.0})
