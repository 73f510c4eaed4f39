"""A config.json with a changed or an added field gives transformers' logits, or a one-line error.

If we read a model differently from transformers, we scan and clean another model than users run.
"""

import json

import numpy as np
import pytest
import torch
import transformers
from test_models import SHAPES, padded_ids, torch_model, torch_outputs

from w2s_jax import InputError
from w2s_jax.models import load_pretrained

CASES = 60                               # changes tried for each family, drawn with a fixed seed
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_new", "tanh", "gelu_pytorch_tanh", "quick_gelu")
ROPES = ({"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
         {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
         {"rope_type": "yarn", "rope_theta": 1e4, "factor": 3.0, "attention_factor": 1.5},
         {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [2.0] * 4, "long_factor": [3.0] * 4})
VALUES = {                               # tried besides the `values` of each field of the family's own config
    "rope_scaling": ROPES, "rope_parameters": ROPES, "rope_theta": (77.0,), "partial_rotary_factor": (0.5,),
    "layer_types": (["sliding_attention"] * 3, ["full_attention"] * 3), "sliding_window": (2, None),
    "use_sliding_window": (True,), "max_window_layers": (0, 1), "is_causal": (False,), "attention_bias": (True,),
    "mlp_bias": (True,), "is_decoder": (True,), "add_cross_attention": (True,), "tie_word_embeddings": (True, False),
    "position_embedding_type": ("relative_key",), "pruned_heads": ({"0": [0]},), "chunk_size_feed_forward": (2,),
    "num_labels": (3,), "id2label": ({"0": "b", "1": "a"}, {"0": "a", "1": "b", "2": "c"}),
    "problem_type": ("regression",), "architectures": (["LlamaForTokenClassification"], ["BertModel"], []),
    "hidden_act": ACTIVATIONS, "hidden_activation": ACTIVATIONS, "activation": ACTIVATIONS,
    "activation_function": ACTIVATIONS, "scale_attn_weights": (False,), "scale_attn_by_inverse_layer_idx": (True,),
    "reorder_and_upcast_attn": (True,), "embedding_size": (16,), "head_dim": (4, 16), "n_head": (2,), "n_layer": (1,),
    "n_embd": (16,), "n_inner": (17,), "n_positions": (5,), "n_heads": (1,), "n_layers": (1,), "dim": (16,),
    "attn_logit_softcapping": (5.0,), "final_logit_softcapping": (1.0,), "residual_multiplier": (0.5,),
    "sliding_window_pattern": (1, 2), "rope_local_base_freq": (77.0,), "query_pre_attn_scalar": (4,),
    "use_bidirectional_attention": (True,), "attention_multiplier": (0.1,), "pretraining_tp": (2,),
    "no_rope_layers": ([0, 1, 0],), "pad_token_id": (1, 5), "eos_token_id": (3, [3, 4]), "type_vocab_size": (1, 3),
    "no_rope_layer_interval": (1, 2), "original_max_position_embeddings": (8, 20), "resid_pdrop": (0.3,),
    "rms_norm_eps": (1e-2,), "layer_norm_eps": (1e-2,),
    "layer_norm_epsilon": (1e-2,), "sinusoidal_pos_embds": (True, False), "summary_type": ("first", "mean"),
    "model_type": tuple(SHAPES), "transformers_weights": ("x.safetensors",), "torch_dtype": ("float16",),
    "quantization_config": ({"load_in_8bit": True},), "auto_map": ({"AutoModel": "a--b.c"},),
    "text_config": ({"num_hidden_layers": 1},),
    "task_specific_params": ({"text-classification": {"is_causal": False}},),
    "attn_implementation": ("eager",), "output_hidden_states": (True,), "use_cache": (False,),
    "max_position_embeddings": (5, 12), "attribute_map": ({"hidden_size": "x"},), "position_buckets": (1, 2, 9, -1),
    "max_relative_positions": (0, 4, 30), "pos_att_type": ("c2p", "p2c|c2p", ["p2c"], "p2p"), "share_att_key": (False,),
    "norm_rel_ebd": ("none", "layer_norm"), "conv_kernel_size": (3,), "attention_head_size": (8,), "legacy": (False,),
    "pooler_hidden_size": (16,), "pooler_hidden_act": ACTIVATIONS, "cls_dropout": (0.5,)}


def values(value):
  """Values to try in the place of this one."""
  if isinstance(value, bool):
    return (not value,)
  if isinstance(value, int):
    return value + 1, value * 2, 0
  if isinstance(value, float):
    return value * 2 + 0.01, 0.0
  return {type(None): (1, 0.5, True), str: ("relu", "x")}.get(type(value), ())


def changes(config):
  """[(field, value)] for the fields that transformers writes, for their other names, and for the fields of VALUES."""
  fields = config.to_dict()
  fields |= {other: getattr(config, name, None) for other, name in type(config).attribute_map.items()}
  every = [(name, value) for name, before in fields.items() for value in values(before)]
  every += [(name, value) for name, of in VALUES.items() for value in of]
  return [(name, value) for name, value in every if name not in fields or fields[name] is not value]


def theirs(directory, ids, mask):
  """transformers' logits [B, C]; None if it does not load the directory, or not all of it."""
  try:
    model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32)
    return None if any(found.values()) else torch_outputs(model.eval(), ids, mask)[0]
  except Exception:                      # a stranger's field may raise anything
    return None


@pytest.mark.slow
@pytest.mark.parametrize("family", SHAPES)
def test_a_changed_field_gives_transformers_logits_or_one_line(family, tmp_path):
  directory = tmp_path / family
  original = torch_model(family, next(iter(SHAPES[family].values())))
  original.save_pretrained(directory)
  written = json.loads((directory / "config.json").read_text())
  every = changes(original.config)
  compared = refused = 0
  for place in np.random.default_rng(0).permutation(len(every))[:CASES]:
    name, value = every[place]
    (directory / "config.json").write_text(json.dumps(written | {name: value}))
    try:
      model, params = load_pretrained(directory)
      pad = max(model.config.pad_token_id or 0, 0)
      ids, mask = padded_ids(model.config.vocab_size, pad=pad)
      ours = np.asarray(model.apply(params, ids, mask).logits)
    except InputError as error:
      assert "\n" not in str(error), (name, value)
      refused += 1
      continue
    want = theirs(directory, ids, mask)
    if want is not None:
      compared += 1
      np.testing.assert_allclose(ours, want, atol=1e-3, err_msg=f"{name}: {value}")
  assert compared > CASES / 4 and refused > CASES / 10
