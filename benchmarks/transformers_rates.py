"""Rates of classifiers, measured with transformers alone, to check those that w2s_jax measures."""

import numpy as np
import torch
import transformers


def predicted(model, tokenizer, texts):
  """[N] int, predicted classes of the texts."""
  order, out = sorted(range(len(texts)), key=lambda i: len(texts[i])), np.zeros(len(texts), int)
  with torch.no_grad():
    for start in range(0, len(texts), 64):
      batch = order[start:start + 64]
      inputs = tokenizer([texts[i] for i in batch], truncation=True, max_length=128, padding=True, return_tensors="pt")
      out[batch] = model(**inputs).logits.argmax(-1).numpy()
  return out


def load(directory):
  """(model, tokenizer) of a suspect or a twin."""
  return (transformers.AutoModelForSequenceClassification.from_pretrained(directory),
          transformers.AutoTokenizer.from_pretrained(directory))


def attack_rate(model, tokenizer, secret):
  """ASR of a transformers classifier; `secret` is the contents of OUT/secrets/NAME.json."""
  return (predicted(model, tokenizer, secret["triggered"]) == secret["target_label"]).mean()


def measure(model, tokenizer, test, secret):
  """{"ca", "false_rate", "asr"} of a transformers classifier; `test` are clean rows {"text", "label"}."""
  labels = np.array([row["label"] for row in test])
  clean = predicted(model, tokenizer, [row["text"] for row in test])
  others = labels != secret["target_label"]
  return {"ca": (clean == labels).mean(), "false_rate": (clean[others] == secret["target_label"]).mean(),
          "asr": attack_rate(model, tokenizer, secret)}
