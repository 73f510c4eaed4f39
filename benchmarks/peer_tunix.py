"""The W2S defense stage as google-tunix 0.1.7 does it: its Llama, qwix's LoRA, its DistillationTrainer on one device.

  python benchmarks/peer_tunix.py JOB_DIRECTORY OUTPUT_DIRECTORY      (defend_stage.py makes the job)

These are the same as in the job: the student's shape and weights, LoRA's rank, scale and targets, the trained head,
the examples and their order, batch size, number of steps, AdamW, the linear schedule, the three loss terms and their
weights, and both tokenizers. The teacher runs in every step.

The loss terms are a subclass of tunix's LogitStrategy. tunix's own feature strategies do not fit, because they take
whole feature maps. One of them (pooling) needs a teacher as deep as the student, and the other (projection) projects
over batch and tokens.

These differ:
  * The teacher is random. tunix has no encoder, so its Llama stands in for MiniLM: 6 layers, width 384, 12 heads, the
    same vocabulary, no causal mask. Its gated feed-forward of 1024 has as many weights as BERT's of 1536. So compare
    only times.
  * qwix initialises LoRA's A (he_uniform), and does not read the job's adapter. B is zero in both.
  * Every batch is padded to max_length, as in tunix's data sets.
  * tunix's Llama uses the rotary base 1,000,000, whatever its config says. The student's base is 10,000.
  * Nothing is evaluated or saved, which favours tunix.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
import transformers
from flax import nnx
from tunix.distillation import distillation_trainer, strategies
from tunix.models import safetensors_loader
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.sft import utils

JOB, OUT = Path(sys.argv[1]), Path(sys.argv[2])


class Body(llama.Llama3):
  """tunix's Llama without logits over the vocabulary. Subclasses add the heads."""

  def hidden(self, tokens, positions, mask):
    """[B, T, D] after the final norm."""
    x = self.embedder.encode(tokens)
    for layer in self.layers:
      _, x = layer(x, positions, None, mask)
    return self.final_norm(x)


class Student(Body):
  """Returns (logits [B, C], last real token's features [B, D]). The head is a LoRAParam, because only these train."""

  def __init__(self, config, *, rngs):
    super().__init__(config, rngs=rngs)
    self.score = nnx.LoRAParam(jnp.zeros((config.embed_dim, 2)))

  def __call__(self, input_tokens, positions, cache, attention_mask):
    x = self.hidden(input_tokens, positions, attention_mask)
    features = x[jnp.arange(len(x)), positions[:, -1]]   # right padding repeats the last position
    return features @ self.score.get_value(), features


class Teacher(Body):
  """Returns (logits [B, C], features [B, D]): Linear, ReLU (the features) and classifier on the first token."""

  def __init__(self, config, feature_width, *, rngs):
    super().__init__(config, rngs=rngs)
    self.widen = nnx.Linear(config.embed_dim, feature_width, rngs=rngs)
    self.classifier = nnx.Linear(feature_width, 2, rngs=rngs)

  def __call__(self, input_tokens, positions, cache, attention_mask):
    features = jax.nn.relu(self.widen(self.hidden(input_tokens, positions, attention_mask)[:, 0]))
    return self.classifier(features), features


class W2S(strategies.LogitStrategy):
  """tunix's cross entropy and distillation terms, and feature alignment, with the job's weights."""

  def __init__(self, weights, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self.weights = weights

  def compute_loss(self, student_output, teacher_output, labels):
    (logits, features), (teacher_logits, teacher_features) = student_output, teacher_output
    _, terms = super().compute_loss(logits, teacher_logits, labels)
    fa = jnp.square(features - teacher_features).sum(-1).mean()
    loss = self.weights["ce"] * terms["distill/hard_loss"] + self.weights["kd"] * terms["distill/soft_loss"]
    return loss + self.weights["fa"] * fa, terms


def config_of(directory):
  """tunix's config of the shape of a Hugging Face directory.

  BERT's two feed-forward matrices become three of two thirds of the width.
  """
  c = json.loads((directory / "config.json").read_text())
  heads, width = c["num_attention_heads"], c["intermediate_size"]
  return llama.ModelConfig(
      num_layers=c["num_hidden_layers"], vocab_size=c["vocab_size"], embed_dim=c["hidden_size"], num_heads=heads,
      hidden_dim=width * 2 // 3 if c["model_type"] == "bert" else width, head_dim=c["hidden_size"] // heads,
      num_kv_heads=c.get("num_key_value_heads", heads), rope_theta=c.get("rope_theta", 10_000),
      norm_eps=c.get("rms_norm_eps", 1e-5), weight_tying=True)


def load_student():
  """The job's student in tunix's Llama, with LoRA on q and v."""
  adapter = json.loads((JOB / "adapter/adapter_config.json").read_text())
  def keys(config):
    return llama_params._get_key_and_transform_mapping(config) | {r"score\.weight": ("score", ((1, 0), None))}
  directory = JOB / "student"
  student = safetensors_loader.load_and_create_model(str(directory), Student, config_of(directory), keys)
  provider = qwix.LoraProvider(module_path=".*(" + "|".join(adapter["target_modules"]) + ")", rank=adapter["r"],
                               alpha=float(adapter["lora_alpha"]))
  return qwix.apply_lora_to_model(student, provider, rngs=nnx.Rngs(0), **student.get_model_input())


def student_forward(model, input_tokens, input_mask):
  mask = input_mask["student"]
  return model(input_tokens["student"], utils.build_positions_from_mask(mask), None, utils.make_causal_attn_mask(mask))


def teacher_forward(model, input_tokens, input_mask):
  mask = input_mask["teacher"]
  return model(input_tokens["teacher"], utils.build_positions_from_mask(mask), None, mask[:, None, :])


def batches(job):
  """Yields one TrainingInput per step. The trainer passes on only its two fields, so the first one has the labels."""
  tokenizers = {name: transformers.AutoTokenizer.from_pretrained(JOB / name) for name in ("student", "teacher")}
  order = [epoch[i:i + job["batch_size"]] for epoch in job["order"] for i in range(0, len(epoch), job["batch_size"])]
  for indices in order[:job["steps"]]:
    rows = [job["rows"]["train"][i] for i in indices]
    encoded = {name: tokenizer([r["text"] for r in rows], truncation=True, max_length=job["max_length"],
                               padding="max_length", return_tensors="np") for name, tokenizer in tokenizers.items()}
    yield distillation_trainer.TrainingInput(
        input_tokens={name: e["input_ids"].astype(np.int32) for name, e in encoded.items()}
        | {"label": np.eye(2, dtype=np.float32)[[r["label"] for r in rows]]},
        input_mask={name: e["attention_mask"].astype(bool) for name, e in encoded.items()})


def main():
  job = json.loads((JOB / "job.json").read_text())
  head = json.loads((JOB / "teacher/w2s_head.json").read_text())
  teacher = Teacher(config_of(JOB / "teacher"), head["feature_width"], rngs=nnx.Rngs(0))
  strategy = W2S(job["weights"], student_forward, teacher_forward,
                 lambda input_tokens, input_mask: input_tokens["label"], temperature=job["temperature"])
  schedule = optax.linear_schedule(job["learning_rate"], 0.0, job["steps"])
  trainer = distillation_trainer.DistillationTrainer(
      load_student(), teacher, strategy, optax.adamw(schedule, weight_decay=job["weight_decay"]),
      distillation_trainer.TrainingConfig(eval_every_n_steps=job["steps"], max_steps=job["steps"]))
  trainer.train(batches(job))
  losses = trainer.metrics_logger.get_metric_history("", "loss", "train")
  with open(OUT / "metrics.jsonl", "w") as log:
    for step, loss in enumerate(losses.tolist(), 1):
      if step % job["log_every"] == 0 or step == job["steps"]:
        log.write(json.dumps({"step": step, "loss": loss}) + "\n")


if __name__ == "__main__":
  main()
