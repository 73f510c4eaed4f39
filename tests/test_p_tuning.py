"""P-tuning: peft's MLP and forward, packed rows, a defense's run, and how the virtual tokens are kept."""

import types

import jax
import numpy as np
import peft
import pytest
import rig
import torch
from cli import CONFIG, w2s_forked
from safetensors.numpy import load_file
from test_adapters import train
from test_lora import flatten, torch_base, torch_logits, with_other_head, with_peft
from test_models import ENCODERS, SHAPES, torch_model

from w2s_jax import InputError, config, lora, quantized, sharding
from w2s_jax.adapters import attach, p_tuning, soft, trees
from w2s_jax.data import packing
from w2s_jax.defenses import crow, distill, w2s
from w2s_jax.measure import deployed, scan, selftest
from w2s_jax.models import load_pretrained, save_pretrained
from w2s_jax.tasks import CLASSIFICATION

S = 4                        # virtual tokens
QUICK = {"llama": "gqa-untied-odd", "gemma2": "gqa", "bert": "odd"}
LONG = {"gpt2": "odd", "gemma": "mqa-wide-heads", "gemma3_text": "gqa", "phi3": "gqa-partial", "roberta": "odd",
        "electra": "odd", "deberta-v2": "own-keys", "distilbert": "odd", "modernbert": "biases-mean"}


def section(**values):
  return config.section(config.Lora, **{"kind": "p_tuning", "virtual_tokens": S, "encoder_width": 7} | values)


def fresh(params, seed=0, **values):
  return attach.add_configured(params, section(**values), key=jax.random.key(seed))


def virtual(params):
  return np.asarray(p_tuning.tokens_of(trees.beside_vocabulary(params)[1]))


def logits(model, params, ids, mask):
  return np.asarray(jax.jit(model.apply)(params, ids, mask).logits)


def ragged(vocab_size, pad):
  """[5, 9] ids and mask, padded on the right with `pad`; the last row is full."""
  rng = np.random.default_rng(0)
  mask = (np.arange(9) < np.array([3, 1, 8, 5, 9])[:, None]).astype(np.int32)
  return np.where(mask, rng.integers(3, vocab_size, mask.shape), pad).astype(np.int32), mask


def test_the_mlp_and_its_gradients_are_pefts():
  leaves = {name: np.asarray(leaf) for name, leaf in p_tuning.new(jax.random.key(0), S, 6, 7).items()}
  theirs = peft.PromptEncoder(peft.PromptEncoderConfig(
      num_virtual_tokens=S, token_dim=6, num_transformer_submodules=1, encoder_hidden_size=7))
  names = {p_tuning.VECTORS: "embedding.weight"}
  for i, name in enumerate(p_tuning.LAYERS):
    names |= {name: f"mlp_head.{2 * i}.weight", f"{name}_bias": f"mlp_head.{2 * i}.bias"}
  def turned(name, value):
    return value.T if name in p_tuning.LAYERS else value
  theirs.load_state_dict({names[name]: torch.tensor(turned(name, leaf)) for name, leaf in leaves.items()})
  out = theirs(torch.arange(S))
  np.testing.assert_allclose(p_tuning.tokens_of(leaves), out.detach().numpy(), atol=1e-6)
  (out ** 3).sum().backward()
  gradients = jax.grad(lambda leaves: (p_tuning.tokens_of(leaves) ** 3).sum())(leaves)
  for name, parameter in theirs.named_parameters():
    ours = next(n for n in names if names[n] == name)
    np.testing.assert_allclose(turned(ours, gradients[ours]), parameter.grad.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family,shape", [*QUICK.items(), *(pytest.param(*case, marks=pytest.mark.long)
                                                           for case in LONG.items())])
def test_ours_is_pefts(family, shape, tmp_path):
  """Our batch has peft's answers to one text at a time. For a decoder one of the texts ends in the padding token."""
  torch_model(family, SHAPES[family][shape]).save_pretrained(tmp_path / "base")
  model, params = load_pretrained(tmp_path / "base")
  trained = with_other_head(model, fresh(params))
  lora.export_adapter(tmp_path / "adapter", model, trained, base=tmp_path / "base")
  theirs = with_peft(torch_base(tmp_path / "base"), tmp_path / "adapter")
  ids, mask = ragged(model.config.vocab_size, model.config.pad_token_id)
  if family not in ENCODERS:
    ids[-1, -1] = model.config.pad_token_id
  want = [torch_logits(theirs, row[None, :m.sum()], m[None, :m.sum()])[0] for row, m in zip(ids, mask)]
  np.testing.assert_allclose(logits(model, trained, ids, mask), want, atol=1e-4)
  if family in ENCODERS:                                     # peft's decoders read the last position, padding too
    np.testing.assert_allclose(torch_logits(theirs, ids, mask), want, atol=1e-4)
  assert np.abs(want - torch_logits(torch_base(tmp_path / "base"), ids, mask)).max() > 0.1
  kept = load_file(tmp_path / "adapter/adapter_model.safetensors")
  np.testing.assert_allclose(kept["prompt_embeddings"], virtual(trained), atol=1e-6)


def test_packed_texts_are_those_alone(bert):
  """Logits, features and every token's states are the same. There are 7 texts and a filler, in two groups of rows."""
  model, params = bert
  params = fresh(params)
  rng = np.random.default_rng(1)
  lengths = np.array([7, 3, 9, 2, 4, 1, 6])
  arrays = {"input_ids": rng.integers(1, 64, (7, 10)).astype(np.int32), "length": lengths}
  mask = (np.arange(10) < lengths[:, None]).astype(np.int32)
  alone = jax.jit(lambda *batch: model.apply(params, *batch, states=True))(arrays["input_ids"], mask)
  batch = packing.pack_batch(arrays, np.arange(7), 8, 12, [2], groups=2, pad_token_id=0)
  assert batch["input_ids"].shape == (4, 12)
  packed = jax.jit(lambda ids, segments, texts: model.apply(params, ids, texts=texts, segment_ids=segments,
                                                            states=True))(*(
      batch[name] for name in ("input_ids", "segment_ids", "texts")))
  np.testing.assert_allclose(packed.logits[:7], alone.logits, atol=1e-5)
  np.testing.assert_allclose(packed.features[:7], alone.features, atol=1e-5)
  states = np.asarray(packed.states).reshape(3, 2, 24, 32)
  np.testing.assert_array_equal(packed.stream, packed.states[-1])
  for i, (first, last) in enumerate(batch["texts"].reshape(8, 2)[:7]):
    np.testing.assert_allclose(states[:, i // 4, first:last + 1], alone.states[:, i, :lengths[i]], atol=1e-5)
    np.testing.assert_allclose(packed.hidden.reshape(2, 24, 32)[i // 4, first:last + 1], alone.hidden[i, :lengths[i]],
                               atol=1e-5)


def test_an_adversarys_soft_tokens_are_others(llama):
  """The ids behind the vocabulary are still the adversary's tokens. The virtual tokens come after them."""
  model, params = llama
  rows = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
  both = soft.put(model, fresh(params), rows)
  ids = np.array([[5, 65, 9], [64, 7, 0]], np.int32)
  mask = np.int32(ids > 0)
  by_hand = soft.put(model, params, np.concatenate([rows, virtual(both)]))
  prompt = np.tile(np.arange(66, 66 + S), (2, 1))
  want = logits(model, by_hand, np.concatenate([prompt, ids], 1), np.concatenate([np.ones_like(prompt), mask], 1))
  np.testing.assert_allclose(logits(model, both, ids, mask), want, atol=1e-5)


def test_virtual_tokens_alone_learn_a_batch(bert, make_batch):
  model, params = bert
  losses, _ = train(model, fresh(params), ("adapter",), make_batch(model))
  assert losses[-1] < losses[0] - 0.05


def test_a_defense_trains_virtual_tokens_and_head(llama, tmp_path, caplog):
  """Two seeds of W2S train as one program. The saved model has the logits of the trained one, also on a mesh."""
  suspect = rig.suspect(*llama, tmp_path)._replace(lora=section())
  suspect.training.update(max_steps=3, evaluations=1)
  both = distill.train(w2s.RECIPE, suspect, rig.DEFENSE, {"one": 0, "two": 1})
  start, model = flatten(suspect.params), suspect.model
  one, two = map(flatten, both)
  for path, leaf in one.items():
    if trees.label(path) == "adapter":
      assert (np.asarray(leaf) != two[path]).any() and "p_tuning" in path
    elif trees.label(path) == "head":
      assert (np.asarray(leaf) != start[path]).any()
    else:
      np.testing.assert_array_equal(leaf, start[path])
  assert len(one) == len(start) + 7 and attach.has_adapters(both[0]) and not attach.has_adapters(suspect.params)
  dev = suspect.encode(suspect.dev)
  before = suspect.place.logits(model, both[0], dev)
  merged = attach.merge(both[0])
  assert flatten(merged).keys() - start.keys() == {"embed_tokens/virtual"} and not attach.has_adapters(merged)
  save_pretrained(tmp_path / "kept", model, merged)
  assert set(load_file(tmp_path / "kept/w2s_adapter.safetensors")) == {"embed_tokens/virtual"}
  again, loaded = load_pretrained(tmp_path / "kept")
  assert "which transformers ignores" in caplog.text
  np.testing.assert_array_equal(flatten(loaded)["embed_tokens/virtual"], virtual(both[0]))
  np.testing.assert_allclose(suspect.place.logits(again, loaded, dev), before, atol=1e-5)
  lora.export_adapter(tmp_path / "adapter", again, loaded)            # also without the MLP
  np.testing.assert_array_equal(load_file(tmp_path / "adapter/adapter_model.safetensors")["prompt_embeddings"],
                                virtual(both[0]))
  mesh = sharding.make_mesh(2, 2, 2)
  on_mesh = suspect.place._replace(mesh=mesh)
  np.testing.assert_allclose(on_mesh.logits(again, load_pretrained(tmp_path / "kept", mesh=mesh)[1], dev), before,
                             atol=1e-5)


def test_a_quantized_base_takes_them(llama):
  """Merging makes plain kernels of the same values, and keeps the virtual tokens."""
  model, params = llama
  ids, mask = ragged(64, 0)
  trained = fresh(quantized.quantize_layers(params, "int8"))
  merged = attach.merge(trained)
  np.testing.assert_allclose(logits(model, merged, ids, mask), logits(model, trained, ids, mask), atol=1e-4)
  np.testing.assert_array_equal(virtual(merged), virtual(trained))


def test_a_model_with_them_is_not_scanned(llama, tmp_path, monkeypatch):
  suspect = rig.suspect(*llama, tmp_path)
  run = types.SimpleNamespace(
      source=types.SimpleNamespace(stages=("scan",)), rows={"test": suspect.dev}, place=suspect.place,
      mesh=suspect.place.mesh, task=CLASSIFICATION, encode=lambda tokenizer, rows, length: suspect.encode(rows),
      config=types.SimpleNamespace(data=types.SimpleNamespace(max_length=16)))
  monkeypatch.setattr(scan, "reading", lambda *args: ["scanned"])
  for params, want in ((suspect.params, ["scanned"]), (attach.merge(fresh(suspect.params)), [])):
    model = deployed.Deployed(suspect.model, params, suspect.tokenizer)
    monkeypatch.setattr(deployed, "deploy", lambda run, name, model=model: model)
    assert deployed.read(run, "w2s", []).scan == want


def test_what_does_not_go_together_is_refused(llama, gpt2, tmp_path):
  model, params = llama
  distill.check("crow", crow.RECIPE, CLASSIFICATION, model, rig.DEFENSE, section(kind="lora"))
  with pytest.raises(InputError, match="virtual tokens .p_tuning. cannot start from given hidden states: set --conf"):
    distill.check("crow", crow.RECIPE, CLASSIFICATION, model, rig.DEFENSE, section())
  for twice in (fresh(params), attach.merge(fresh(params))):
    with pytest.raises(InputError, match="has virtual tokens already.*set --config.lora.kind"):
      fresh(twice)
  with pytest.raises(InputError, match="hold virtual tokens and adapters beside kernels: want one kind"):
    lora.export_adapter(tmp_path / "adapter", model, lora.add_lora(fresh(params), 2, 2.0, key=jax.random.key(0)))
  assert not (tmp_path / "adapter").exists()
  with pytest.raises(InputError, match="a text has 61 tokens, the model 60 positions"):
    gpt2[0].apply(fresh(gpt2[1]), np.ones((1, 61), np.int32), np.ones((1, 61), np.int32))
  assert selftest.tested(run_config("lora")) == "w2s" and selftest.tested(run_config("p_tuning")) is None


def run_config(kind):
  return types.SimpleNamespace(defenses=("w2s",), selftest=types.SimpleNamespace(triggers=4), lora=section(kind=kind))


def test_a_run_refuses_them_before_it_trains(llama, tmp_path):
  """More virtual tokens than positions are refused, and so is a suspect that has virtual tokens."""
  out = w2s_forked(CONFIG, f"--workdir={tmp_path / 'long'}", "--config.lora.kind=p_tuning",
                   "--config.lora.virtual_tokens=900")
  assert out.returncode == 2 and "lora.virtual_tokens is 900, but texts of 32 tokens leave" in out.stderr
  suspect = rig.suspect(*llama, tmp_path)
  save_pretrained(tmp_path / "suspect", suspect.model, attach.merge(fresh(suspect.params)), suspect.tokenizer)
  out = w2s_forked("--config=configs/clean_checkpoint.py", "--config.data.train=grammar:phrases",
                   f"--config.student.path={tmp_path / 'suspect'}", f"--workdir={tmp_path / 'given'}")
  assert out.returncode == 2 and "has virtual tokens (p_tuning), which neither the scan nor" in out.stderr
  assert not (tmp_path / "long").exists() and not (tmp_path / "given").exists()
