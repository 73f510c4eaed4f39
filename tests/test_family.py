"""A new family is one file and one line. Here it is a decoder whose layers alternate: full attention, a window."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from rig import keys, make_program, one_run

from w2s_jax import lora, sharding
from w2s_jax.adapters import soft, trees
from w2s_jax.models import config_from_hf, family, layers, load_pretrained, save_pretrained
from w2s_jax.models import model as models
from w2s_jax.models.hf.formats import Checkpoint, modules
from w2s_jax.models.latent import Latent


@dataclasses.dataclass(frozen=True)
class TurnsConfig(family.SharedConfig):
  model_type: str = "turns"
  vocab_size: int = 64
  hidden_size: int = 32
  num_layers: int = 4
  num_heads: int = 4
  window: int = 3                     # of layers 1, 3...: a token sees itself and two before it

  @classmethod
  def from_hf(cls, fields, **runtime):
    return cls(num_layers=fields.integer("num_layers", 4), **family.shared_from_hf(fields), **runtime)

  def to_hf(self):
    return family.shared_to_hf(self) | {"num_layers": self.num_layers}


class Block(nn.Module):
  config: TurnsConfig
  train: bool

  @nn.compact
  def __call__(self, x, mask, window):
    c, places = self.config, jnp.arange(x.shape[1])
    def project(name):
      return layers.linear(c, self.train, c.hidden_size, f"{name}_proj", use_bias=False)
    q, k, v = (project(name)(x).reshape(*x.shape[:2], c.num_heads, -1) for name in "qkv")
    near = places[:, None] - places < window
    return x + project("o")(layers.attention(q, k, v, mask & near, 0.0).reshape(x.shape)), None


class Turns(nn.Module):
  config: TurnsConfig
  train: bool = False

  @nn.compact
  def __call__(self, input_ids, segment_ids, texts=None, stream=None):
    c = self.config
    embed_tokens = layers.embed(c, c.vocab_size, "embed_tokens", layers.Tokens)
    x = embed_tokens(input_ids) if stream is None else stream
    windows = np.where(np.arange(c.num_layers) % 2, c.window, input_ids.shape[1])
    x = layers.layer_stack(Block, c, self.train, x, layers.causal_mask(segment_ids), per_layer=(windows,))
    return layers.decoder_head(c, embed_tokens, layers.layer_norm(1e-5, "norm"), x, input_ids, segment_ids, texts)


FAMILY = family.Family(
    config=TurnsConfig, module=Turns,
    tensors={"turns": Checkpoint("Turns", "model.", {
        "embed_tokens/embedding": "model.embed.weight", "score/kernel": "score.weight",
        **modules(((f"layers/{p}_proj", f"model.layers.{{}}.{p}") for p in "qkvo"), both=False),
        **modules((("norm", "model.norm"),), "scale")}, unused="")},
    shardings=((r"embed_tokens/embedding", P("tensor", "fsdp")), (r"layers/._proj/kernel", P(None, "fsdp", "tensor")),
               (r"norm/(scale|bias)", P()), (r"score/kernel", P("fsdp", None))),
    vocabulary=("embed_tokens",))


@pytest.fixture
def turns(monkeypatch):
  """(Model, params) of the family, made from a config.json."""
  monkeypatch.setitem(models.FAMILIES, "turns", FAMILY)
  config = config_from_hf({"model_type": "turns", "vocab_size": 64, "initializer_range": 0.2, "pad_token_id": 0})
  model = models.Model(config)
  return model, model.init(jax.random.key(0))


def in_numpy(params, ids, windows):
  """Logits [2] of one text without padding. windows: for each layer the number of tokens that it sees."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x, T = p["embed_tokens"]["embedding"][ids], len(ids)
  for layer, window in enumerate(windows):
    q, k, v = ((x @ p["layers"][f"{n}_proj"]["kernel"][layer]).reshape(T, 4, 8) for n in "qkv")
    scores, distance = np.einsum("qhd,khd->hqk", q, k) / 8**0.5, np.arange(T)[:, None] - np.arange(T)
    scores = np.where((distance >= 0) & (distance < window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v).reshape(T, 32)
    x = x + out @ p["layers"]["o_proj"]["kernel"][layer]
  last = (x[-1] - x[-1].mean()) / np.sqrt(x[-1].var() + 1e-5)
  return (last * p["norm"]["scale"] + p["norm"]["bias"]) @ p["score"]["kernel"]


IDS = np.random.default_rng(0).integers(1, 64, (2, 9)).astype(np.int32)
REAL = (np.arange(9) < np.array([9, 6])[:, None]).astype(np.int32)


def logits(model, params):
  return jax.jit(model.apply)(params, IDS, REAL).logits


@pytest.mark.parametrize("runtime", [{}, {"unroll": True}, {"remat": "full"}])
def test_each_layer_gets_its_own_window(turns, runtime):
  model, params = turns
  got = logits(models.Model(dataclasses.replace(model.config, **runtime)), params)
  want = [in_numpy(params, IDS[i, :n], (9, 3, 9, 3)) for i, n in enumerate((9, 6))]
  np.testing.assert_allclose(got, want, atol=1e-4)
  others = [in_numpy(params, IDS[0], windows) for windows in ((3, 9, 3, 9), (9, 9, 9, 9), (3, 3, 3, 3))]
  assert all(np.abs(other - want[0]).max() > 1e-2 for other in others)


@pytest.mark.parametrize("below", [1, 2])
def test_part_of_the_layers_keeps_its_own_windows(turns, below):
  model, params = turns
  latent = Latent(model, below)
  got = logits(latent, soft.put(model, params, jnp.zeros((1, 32))))
  np.testing.assert_allclose(got, logits(model, params), atol=1e-5)


def test_it_trains_adapters_and_shards(turns, make_batch):
  """One LoRA step on a mesh of 2 x 2 x 2 is the step on one device."""
  model, params = turns
  params, batch, moved = lora.add_lora(params, 4, 4.0, key=jax.random.key(1)), make_batch(model), []
  for mesh in (sharding.make_mesh(2, 2, 2), sharding.make_mesh(devices=jax.devices()[:1])):
    placed = jax.device_put(params, sharding.param_shardings(params, model.shardings, mesh))
    trainable, frozen = trees.split(placed, trees.LORA)
    program = make_program(model, trainable, frozen, mesh)
    state, metrics = program.step(program.init([trainable]), frozen, sharding.global_batch(one_run(batch), mesh, 1),
                                  keys(7))
    moved.append((metrics["loss"][0], metrics["grad_norm"][0], np.asarray(state.params["layers"]["q_proj"]["lora_b"])))
    assert placed["layers"]["q_proj"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
  (loss, norm, lora_b), want = moved
  np.testing.assert_allclose((loss, norm), want[:2], rtol=1e-4)
  np.testing.assert_allclose(lora_b, want[2], atol=1e-3)        # Adam's first step has the size of the rate, 1e-2
  assert np.abs(lora_b).max() > 5e-3


def test_it_is_saved_and_loaded(turns, tmp_path):
  model, params = turns
  save_pretrained(tmp_path / "turns", model, params)
  np.testing.assert_array_equal(logits(*load_pretrained(tmp_path / "turns")), logits(model, params))


def test_a_per_layer_input_with_too_few_layers_is_an_error(turns, monkeypatch):
  model, params = turns
  monkeypatch.setattr(np, "where", lambda *args: np.full(3, 3))
  with pytest.raises(ValueError, match=r"\(3,\).*4 layers"):
    model.apply(params, IDS, REAL)
