"""The LoRA distillation step in PyTorch: seconds and memory for each number of rows, as JSON lines.

  python benchmarks/peer_pytorch_step.py CONFIG_JSON --rank=512 --length=128 --rows=8,16 --dtype=bfloat16 --steps=10

CONFIG_JSON is transformers' config as text; weights are random. accelerator.py runs it on the card it measures.
"""

import argparse
import json
import statistics
import time

import peft
import torch
import transformers


def timed_steps(model, optimizer, rows, length, steps, device):
  """Median seconds of a step after the first two; the batch's rows are full."""
  c = model.config
  generator = torch.Generator().manual_seed(0)
  ids = torch.randint(1, c.vocab_size, (rows, length), generator=generator).to(device)
  label = torch.randint(0, 2, (rows,), generator=generator).to(device)
  teacher_logits, teacher_features = (torch.randn(rows, n, device=device) for n in (2, c.hidden_size))
  seconds = []
  for _ in range(steps + 2):
    start = time.perf_counter()
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    logits, features = out.logits.float(), out.hidden_states[-1][:, -1].float()
    kd = torch.nn.functional.kl_div((logits / 2).log_softmax(-1), (teacher_logits / 2).log_softmax(-1),
                                    reduction="batchmean", log_target=True)
    loss = (torch.nn.functional.cross_entropy(logits, label) + 4 * kd
            + 0.01 * (features - teacher_features).square().sum(-1).mean())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    loss.item()                                              # waits for the device
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds[2:])


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("config")
  parser.add_argument("--rank", type=int, required=True)
  parser.add_argument("--length", type=int, required=True)
  parser.add_argument("--rows", required=True)
  parser.add_argument("--dtype", required=True)
  parser.add_argument("--steps", type=int, required=True)
  args = parser.parse_args()
  device = "cuda" if torch.cuda.is_available() else "cpu"
  hf = json.loads(args.config)
  config = transformers.AutoConfig.for_model(**hf, use_cache=False)
  torch.set_default_dtype(getattr(torch, args.dtype))
  with torch.device(device):
    model = transformers.AutoModelForSequenceClassification.from_config(config)
  torch.set_default_dtype(torch.float32)
  model = peft.get_peft_model(model, peft.LoraConfig(
      task_type="SEQ_CLS", r=args.rank, lora_alpha=args.rank, target_modules=["q_proj", "v_proj"])).to(device)
  for p in model.parameters():                               # what trains is float32, as with us
    p.data = p.data.float() if p.requires_grad else p.data
  model.train()
  optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
  for checkpointing in (False, True):
    if checkpointing:
      model.gradient_checkpointing_enable()
      model.enable_input_require_grads()
    for rows in map(int, args.rows.split(",")):
      line = {"who": "pytorch", "rows": rows, "remat": "full" if checkpointing else "none"}
      if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
      try:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
          seconds = timed_steps(model, optimizer, rows, args.length, args.steps, device)
        line |= {"step_s": seconds, "tokens_per_s": rows * args.length / seconds}
        if device == "cuda":
          line["peak_bytes"] = torch.cuda.max_memory_allocated()
      except torch.cuda.OutOfMemoryError:
        line["error"] = "out of memory"
      print(json.dumps(line), flush=True)


if __name__ == "__main__":
  main()
