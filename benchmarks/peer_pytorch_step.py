"""The LoRA distillation step in PyTorch: seconds of each step, and memory, as JSON lines.

  python benchmarks/peer_pytorch_step.py --rank=512 --dtype=bfloat16 < GIVEN

GIVEN is {"config": transformers' config.json, "cases": [{"length", "rows", "lengths"}]}. `lengths` has for each batch a
list of its texts' numbers of tokens. Weights and tokens are random. A batch is padded to its longest text. The script
prints a line for each case, first without and then with gradient checkpointing. accelerator.py starts this script on
the card that it measures.
"""

import argparse
import json
import sys
import time

import peft
import torch
import transformers


def timed_steps(model, optimizer, lengths, device):
  """Seconds of a step on each batch. `lengths` has for each batch a list of its texts' numbers of tokens."""
  c = model.config
  generator = torch.Generator().manual_seed(0)
  seconds = []
  for texts in lengths:
    rows, last = len(texts), torch.tensor(texts, device=device) - 1
    ids = torch.randint(1, c.vocab_size, (rows, max(texts)), generator=generator).to(device)
    mask = (torch.arange(max(texts), device=device) <= last[:, None]).long()
    label = torch.randint(0, 2, (rows,), generator=generator).to(device)
    teacher_logits, teacher_features = (torch.randn(rows, n, device=device) for n in (2, c.hidden_size))
    start = time.perf_counter()
    out = model(input_ids=ids * mask, attention_mask=mask, output_hidden_states=True)
    logits, features = out.logits.float(), out.hidden_states[-1][torch.arange(rows, device=device), last].float()
    kd = torch.nn.functional.kl_div((logits / 2).log_softmax(-1), (teacher_logits / 2).log_softmax(-1),
                                    reduction="batchmean", log_target=True)
    loss = (torch.nn.functional.cross_entropy(logits, label) + 4 * kd
            + 0.01 * (features - teacher_features).square().sum(-1).mean())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()
    if device == "cuda":
      torch.cuda.synchronize()                               # waits for the optimizer's kernels too
    seconds.append(time.perf_counter() - start)
  return seconds


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rank", type=int, required=True)
  parser.add_argument("--dtype", required=True)
  args = parser.parse_args()
  given = json.load(sys.stdin)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  config = transformers.AutoConfig.for_model(**given["config"], use_cache=False)
  torch.set_default_dtype(getattr(torch, args.dtype))
  with torch.device(device):
    model = transformers.AutoModelForSequenceClassification.from_config(config)
  torch.set_default_dtype(torch.float32)
  model = peft.get_peft_model(model, peft.LoraConfig(
      task_type="SEQ_CLS", r=args.rank, lora_alpha=args.rank, target_modules=["q_proj", "v_proj"])).to(device)
  for p in model.parameters():                               # trainable parameters are float32, as with us
    p.data = p.data.float() if p.requires_grad else p.data
  model.train()
  optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
  for checkpointing in (False, True):
    if checkpointing:
      model.gradient_checkpointing_enable()
      model.enable_input_require_grads()
    for case in given["cases"]:
      line = {"who": "pytorch", "length": case["length"], "rows": case["rows"],
              "remat": "full" if checkpointing else "none"}
      if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
      try:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
          line["seconds"] = timed_steps(model, optimizer, case["lengths"], device)
        if device == "cuda":
          line["peak_bytes"] = torch.cuda.max_memory_allocated()
      except torch.cuda.OutOfMemoryError:
        line["error"] = "out of memory"
      print(json.dumps(line), flush=True)


if __name__ == "__main__":
  main()
