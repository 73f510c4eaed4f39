"""transformers' names of each model type's tensors. {} is the layer number."""

from typing import NamedTuple


class Checkpoint(NamedTuple):
  """How transformers writes one model type.

  Attributes:
    name: of its classes: NAME + "ForSequenceClassification", "ForCausalLM", "Model".
    prefix: of the backbone's tensors inside those; a file saved from the backbone class alone lacks it.
    weights: {our parameter path: tensor name}.
    unused: pattern of tensors that nobody reads here (other heads, buffers of transformers 4).
    transposed: layers' kernels are [out, in] in the file (torch.nn.Linear); False for GPT-2's Conv1D.
  """
  name: str
  prefix: str
  weights: dict
  unused: str
  transposed: bool = True


HEAD = r"(score|pooler|widen|classifier)/.*"   # our paths that a checkpoint may lack: initialised afresh, which is said


def _modules(pairs, kernel="kernel", both=True):
  """{path: tensor name} of (our module, their module) pairs: kernel (or scale) and bias."""
  return {f"{ours}/{leaf}": f"{theirs}.{tensor}" for ours, theirs in pairs
          for leaf, tensor in ((kernel, "weight"), ("bias", "bias"))[:2 if both else 1]}


def _decoder(name):
  layer = "model.layers.{}"
  return Checkpoint(name, "model.", {
      "embed_tokens/embedding": "model.embed_tokens.weight",
      **_modules((f"layers/attn/{p}_proj", f"{layer}.self_attn.{p}_proj") for p in "qkvo"),
      **_modules(((f"layers/attn/{p}_norm", f"{layer}.self_attn.{p}_norm") for p in "qk"), "scale", both=False),
      **_modules(((f"layers/mlp/{p}_proj", f"{layer}.mlp.{p}_proj") for p in ("gate", "up", "down")), both=False),
      **_modules((("layers/attn_norm", f"{layer}.input_layernorm"), ("norm", "model.norm"),
                  ("layers/mlp_norm", f"{layer}.post_attention_layernorm")), "scale", both=False),
      "score/kernel": "score.weight", "lm_head/embedding": "lm_head.weight",
  }, unused=r"score\.weight|lm_head\.weight|.*rotary_emb\.inv_freq")


def _encoder(name, prefix, embeddings, layer, modules, head, lm_head, unused):
  """modules: theirs, in the order q, k, v, o, norm, up, down, norm; lm_head: dense, norm, and where the bias is."""
  q, k, v, o, attn_norm, up, down, mlp_norm = (f"{prefix}{layer}.{{}}.{m}" for m in modules)
  return Checkpoint(name, prefix, {
      **{f"embeddings/{e}_embeddings/embedding": f"{prefix}embeddings.{e}_embeddings.weight" for e in embeddings},
      **_modules((("layers/attn/q_proj", q), ("layers/attn/k_proj", k), ("layers/attn/v_proj", v),
                  ("layers/attn/o_proj", o), ("layers/mlp/up_proj", up), ("layers/mlp/down_proj", down))),
      **_modules((("embeddings/norm", f"{prefix}embeddings.LayerNorm"), ("layers/attn_norm", attn_norm),
                  ("layers/mlp_norm", mlp_norm)), "scale"),
      **_modules(head),
      **_modules((("lm_head/dense", lm_head[0]),)), **_modules((("lm_head/norm", lm_head[1]),), "scale"),
      "lm_head/bias": f"{lm_head[2]}.bias",
  }, unused)


_BERT = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
         "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")
_DISTILBERT = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm",
               "ffn.lin1", "ffn.lin2", "output_layer_norm")
CHECKPOINTS = {
    "llama": _decoder("Llama"), "mistral": _decoder("Mistral"), "qwen2": _decoder("Qwen2"), "qwen3": _decoder("Qwen3"),
    "gpt2": Checkpoint("GPT2", "transformer.", {
        "embed_tokens/embedding": "transformer.wte.weight", "position_embeddings/embedding": "transformer.wpe.weight",
        **_modules((f"layers/{block}/{m}", f"transformer.h.{{}}.{block}.{m}") for block, m in (
            ("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj"))),
        **_modules((("layers/attn_norm", "transformer.h.{}.ln_1"), ("layers/mlp_norm", "transformer.h.{}.ln_2"),
                    ("norm", "transformer.ln_f")), "scale"),
        "score/kernel": "score.weight", "lm_head/embedding": "lm_head.weight",
    }, unused=r"score\.weight|lm_head\.weight|transformer\.h\.\d+\.attn\.(masked_)?bias", transposed=False),
    "bert": _encoder("Bert", "bert.", ("word", "position", "token_type"), "encoder.layer", _BERT,
                     (("pooler", "bert.pooler.dense"), ("classifier", "classifier")),
                     ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions"),
                     r"bert\.embeddings\.position_ids|bert\.pooler\.dense\..*|classifier\.(weight|bias)|cls\..*"),
    "roberta": _encoder("Roberta", "roberta.", ("word", "position", "token_type"), "encoder.layer", _BERT,
                        (("pooler", "classifier.dense"), ("classifier", "classifier.out_proj")),
                        ("lm_head.dense", "lm_head.layer_norm", "lm_head"),
                        r"roberta\.embeddings\.position_ids|(roberta\.pooler|lm_head|classifier)\..*"),
    "distilbert": _encoder("DistilBert", "distilbert.", ("word", "position"), "transformer.layer", _DISTILBERT,
                           (("pooler", "pre_classifier"), ("classifier", "classifier")),
                           ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
                           r"distilbert\.embeddings\.position_ids"
                           r"|(vocab_(transform|layer_norm|projector)|(pre_)?classifier)\..*"),
}
HEAD_FILE, HEAD_CONFIG = "w2s_head.safetensors", "w2s_head.json"               # the W2S teacher's, beside its backbone
W2S_HEAD = _modules((("widen", "w2s.widen"), ("classifier", "classifier")))


def weight_names(config, paths):
  """{path: tensor name} of these parameter paths."""
  table = CHECKPOINTS[config.model_type].weights | (W2S_HEAD if getattr(config, "feature_width", 0) else {})
  return {path: table[path] for path in paths}


def is_transposed(config, path):
  """Whether the file has this leaf with its last two axes swapped."""
  return path.endswith("kernel") and (CHECKPOINTS[config.model_type].transposed or not path.startswith("layers/"))
