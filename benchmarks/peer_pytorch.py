"""The W2S defense stage in the usual PyTorch way: transformers, peft, a teacher pass in every step, padded batches.

  python benchmarks/peer_pytorch.py JOB_DIRECTORY OUTPUT_DIRECTORY [--best]      (defend_stage.py makes the job)

--best: the teacher reads the texts once, before the first step, and a batch has texts of like lengths.
"""

import json
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers import trainer_pt_utils

JOB, OUT, BEST = Path(sys.argv[1]), Path(sys.argv[2]), "--best" in sys.argv


class Teacher(torch.nn.Module):
  """The encoder with the W2S head on its first token: Linear, ReLU (the features), classifier."""

  def __init__(self, directory):
    super().__init__()
    self.backbone = transformers.AutoModel.from_pretrained(directory, add_pooling_layer=False)
    head = load_file(directory / "w2s_head.safetensors")
    self.widen = torch.nn.Linear(*reversed(head["w2s.widen.weight"].shape))
    self.classifier = torch.nn.Linear(*reversed(head["classifier.weight"].shape))
    self.widen.load_state_dict({"weight": head["w2s.widen.weight"], "bias": head["w2s.widen.bias"]})
    self.classifier.load_state_dict({"weight": head["classifier.weight"], "bias": head["classifier.bias"]})

  def forward(self, **inputs):
    features = torch.relu(self.widen(self.backbone(**inputs).last_hidden_state[:, 0]))
    return self.classifier(features), features


def student_outputs(student, inputs, pooled):
  """(logits [B, C], features [B, D]). The features are the final hidden state of the first or the last real token."""
  out = student(**inputs, output_hidden_states=True)
  token = inputs["attention_mask"].sum(1) - 1 if pooled == "last" else torch.zeros(len(out.logits), dtype=int)
  return out.logits, out.hidden_states[-1][torch.arange(len(token)), token]


def batches_of_like_lengths(lengths, size, epochs):
  """Row indices of each batch, [at most size]: transformers' order for group_by_length."""
  torch.manual_seed(0)
  orders = [trainer_pt_utils.get_length_grouped_indices(lengths, size) for _ in range(epochs)]
  return [order[i:i + size] for order in orders for i in range(0, len(order), size)]


def main():
  job = json.loads((JOB / "job.json").read_text())
  train, dev = job["rows"]["train"], job["rows"]["dev"]
  student_tokenizer, teacher_tokenizer = (transformers.AutoTokenizer.from_pretrained(JOB / name)
                                          for name in ("student", "teacher"))
  student = transformers.AutoModelForSequenceClassification.from_pretrained(JOB / "student")
  student = peft.PeftModel.from_pretrained(student, JOB / "adapter", is_trainable=True)
  teacher = Teacher(JOB / "teacher").eval()
  trainable = [p for p in student.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trainable, job["learning_rate"], weight_decay=job["weight_decay"])
  schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, job["steps"])
  order = [epoch[i:i + job["batch_size"]] for epoch in job["order"] for i in range(0, len(epoch), job["batch_size"])]
  T, weights = job["temperature"], job["weights"]
  def tokens(tokenizer, rows):
    return tokenizer([r["text"] for r in rows], truncation=True, max_length=job["max_length"], padding=True,
                     return_tensors="pt", return_token_type_ids=False)
  def teach(rows):
    with torch.no_grad():
      return teacher(**tokens(teacher_tokenizer, rows))
  if BEST:
    lengths = [len(ids) for ids in student_tokenizer([r["text"] for r in train])["input_ids"]]
    order = batches_of_like_lengths(lengths, job["batch_size"], len(job["order"]))
    by_length = sorted(range(len(train)), key=lengths.__getitem__)
    parts = [by_length[i:i + job["eval_batch_size"]] for i in range(0, len(train), job["eval_batch_size"])]
    taught = [teach([train[i] for i in part]) for part in parts]
    cached = {i: outputs for part, both in zip(parts, taught) for i, outputs in zip(part, zip(*both))}
  def accuracy():
    student.eval()
    right = 0
    with torch.no_grad():
      for i in range(0, len(dev), job["eval_batch_size"]):
        rows = dev[i:i + job["eval_batch_size"]]
        predicted = student(**tokens(student_tokenizer, rows)).logits.argmax(-1)
        right += (predicted == torch.tensor([r["label"] for r in rows])).sum().item()
    return right / len(dev)
  best, best_state = -1.0, None
  with open(OUT / "metrics.jsonl", "w") as log:
    for step in range(1, job["steps"] + 1):
      rows = [train[i] for i in order[step - 1]]
      student.train()
      if BEST:
        teacher_logits, teacher_features = map(torch.stack, zip(*(cached[i] for i in order[step - 1])))
      else:
        teacher_logits, teacher_features = teach(rows)
      logits, features = student_outputs(student, tokens(student_tokenizer, rows), job["pooled"])
      ce = torch.nn.functional.cross_entropy(logits, torch.tensor([r["label"] for r in rows]))
      kd = T**2 * torch.nn.functional.kl_div((logits / T).log_softmax(-1), (teacher_logits / T).log_softmax(-1),
                                             reduction="batchmean", log_target=True)
      fa = (features - teacher_features).square().sum(-1).mean()
      loss = weights["ce"] * ce + weights["kd"] * kd + weights["fa"] * fa
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
      schedule.step()
      line = {"step": step, "loss": loss.item()}
      if step % max(1, job["steps"] // job["evaluations"]) == 0 or step == job["steps"]:
        line["dev_accuracy"] = accuracy()
        if line["dev_accuracy"] > best:
          best = line["dev_accuracy"]
          best_state = {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}
      if step % job["log_every"] == 0 or "dev_accuracy" in line:
        log.write(json.dumps(line) + "\n")
  student.load_state_dict(best_state, strict=False)
  student.merge_and_unload().save_pretrained(OUT / "model")


if __name__ == "__main__":
  main()
