"""CE-only LoRA fine-tuning on the same clean data: the control of every distillation row."""

from w2s_jax import losses


def terms(student, batch, temperature):
  del temperature
  return {"ce": losses.cross_entropy(student.logits, batch["label"], batch["weight"])}
