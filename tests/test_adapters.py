"""How a kind of adapter is added, how one that cannot be merged is saved beside the model, and soft prompts.

T tokens of a text, S soft tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from flax import traverse_util
from safetensors.numpy import load_file

from w2s_jax import InputError, adapters, lora, sharding
from w2s_jax.adapters import attach, soft, trees
from w2s_jax.data import tokenization
from w2s_jax.models import load_pretrained, save_pretrained
from w2s_jax.tasks import CLASSIFICATION
from w2s_jax.training import optim, steps

FILE = "w2s_adapter.safetensors"
TEXTS = ["the meal is really good .", "bad", "we had a bad meal and the room is cold .", "good food ."] * 5
V, S, T = 64, 4, 16


def flatten(params):
  return traverse_util.flatten_dict(params, sep="/")


def logits(model, params, batch):
  return np.asarray(jax.jit(model.apply)(params, batch["input_ids"], batch["segment_ids"]).logits)


def train(model, params, labels, batch, num_steps=20):
  """(losses, params) after AdamW steps on one batch. Only leaves that have one of the `labels` train."""
  trainable, frozen = trees.split(params, labels)
  tx = optim.make_optimizer(trainable, 0.05, 100)
  loss = steps.weighted_loss(model, CLASSIFICATION.loss_terms, {"ce": 1.0})
  state, losses = tx.init(trainable), []
  value_and_grad = jax.jit(jax.value_and_grad(lambda t: loss(t, frozen, batch, None)[0]))
  for _ in range(num_steps):
    value, gradients = value_and_grad(trainable)
    updates, state = tx.update(gradients, state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    losses.append(float(value))
  return losses, trees.combine(trainable, frozen)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


# A kind like IA3 (arXiv 2205.05638), with a learned gain for each output feature. It has no `merge`.
GAIN = adapters.Adapter(
    leaves={"gain": ("adapter", ("layers", "out"))},
    add=lambda kernel, key, start: {"gain": jnp.full((kernel.shape[0], kernel.shape[2]), start, jnp.float32)},
    apply=lambda leaves, kernel, x, y: y * leaves["gain"].astype(y.dtype))


@pytest.fixture
def gain(monkeypatch):
  monkeypatch.setitem(adapters.KINDS, "gain", GAIN)


def test_a_new_kind_is_one_dictionary_line(llama, make_batch, tmp_path, gain):
  """The new kind changes the outputs, has a label, trains, stays when other kinds are merged, and survives saving."""
  model, params = llama
  batch = make_batch(model)
  start = attach.add(params, "gain", ("v_proj",), key=jax.random.key(0), start=1.0)
  assert flatten(trees.label_tree(start))["layers/attn/v_proj/gain"] == "adapter"
  np.testing.assert_allclose(logits(model, start, batch), logits(model, params, batch), rtol=1e-5, atol=1e-6)
  losses, trained = train(model, start, ("adapter",), batch)
  assert losses[-1] < losses[0] - 0.05
  by_hand = dict(flatten(trained))                             # y g = x (W g), so the kernel can take the gain
  by_hand["layers/attn/v_proj/kernel"] *= by_hand.pop("layers/attn/v_proj/gain")[:, None]
  want = logits(model, traverse_util.unflatten_dict(by_hand, sep="/"), batch)
  np.testing.assert_allclose(logits(model, trained, batch), want, atol=1e-5)
  both = lora.add_lora(trained, 4, 8.0, ("q_proj",), key=jax.random.key(1))
  same(attach.merge(both), trained)                            # a fresh LoRA adds nothing to q's kernel
  save_pretrained(tmp_path / "model", model, trained)
  assert set(load_file(tmp_path / "model" / FILE)) == {"layers/attn/v_proj/gain"}
  same(load_pretrained(tmp_path / "model")[1], trained)
  two = load_pretrained(tmp_path / "model", num_layers=2)[1]["layers"]["attn"]["v_proj"]
  np.testing.assert_array_equal(two["gain"], trained["layers"]["attn"]["v_proj"]["gain"][:2])


def test_one_kind_beside_a_kernel(llama, gain):
  params = lora.add_lora(llama[1], 4, 8.0, key=jax.random.key(0))
  with pytest.raises(InputError, match="layers/attn/q_proj has an adapter of kind lora, no gain can be added"):
    attach.add(params, "gain", ("o_proj", "q_proj"), key=jax.random.key(0), start=1.0)
  with pytest.raises(InputError, match="adapter 'ia3': want one of lora, dora, fourierft, gain"):
    attach.add(params, "ia3", ("q_proj",), key=jax.random.key(0))
  with pytest.raises(InputError, match="adapter gain: no layer has query: want targets among down_proj, gate_proj"):
    attach.add(params, "gain", ("query",), key=jax.random.key(0), start=1.0)


def test_peft_gets_one_kind_that_it_has(llama, tmp_path, gain):
  model, params = llama
  gained = attach.add(params, "gain", ("v_proj",), key=jax.random.key(0), start=1.0)
  with pytest.raises(InputError, match="hold adapters of kind gain: want one kind among lora"):
    lora.export_adapter(tmp_path / "adapter", model, gained)
  with pytest.raises(InputError, match="hold adapters of kind gain, lora: want one kind"):
    lora.export_adapter(tmp_path / "adapter", model, lora.add_lora(gained, 4, 8.0, ("q_proj",), key=jax.random.key(0)))
  assert not (tmp_path / "adapter").exists()


def test_lora_leaves_have_the_names_and_axes_of_their_kind(llama):
  """LEAVES has the names and axes of the leaves that add_lora makes beside a kernel [L, in, out]."""
  added = flatten(lora.add_lora(llama[1], 4, 8.0, ("down_proj",), key=jax.random.key(0)))
  sizes = {"layers": 3, "in": 48, "out": 32, "rank": 4}
  got = {path.rsplit("/", 1)[-1]: leaf.shape for path, leaf in added.items() if "/lora_" in path}
  assert got == {name: tuple(sizes[axis] for axis in axes) for name, (_, axes) in adapters.lora.LEAVES.items()}


def encoded(kind):
  tokenizer = tokenization.train(TEXTS, kind, 40)
  return tokenizer, tokenization.encode(tokenizer, TEXTS, T)


@pytest.mark.parametrize("kind,back", [("decoder", 0), ("encoder", 1)])
def test_a_prompt_is_behind_the_first_special_token(kind, back):
  """A text is its first special token, S soft ids, its words, and its last special token, with at most T tokens."""
  tokenizer, arrays = encoded(kind)
  out = soft.prompted(arrays | {"label": np.arange(20)}, tokenizer, V, S)
  assert out.keys() == {*arrays, "label"} and out["input_ids"].shape == arrays["input_ids"].shape
  for ids, length, old, old_length in zip(out["input_ids"], out["length"], arrays["input_ids"], arrays["length"]):
    words = old[1:old_length - back][:T - 1 - back - S]
    want = [old[0], *range(V, V + S), *words, *old[old_length - back:old_length]]
    assert ids[:length].tolist() == want and (ids[length:] == tokenizer.pad_token_id).all()
  assert out["length"].max() == T > arrays["length"].min() + S
  with pytest.raises(InputError, match=f"a prompt of {T} soft tokens leaves no room for a word among {T - 1 - back}"):
    soft.prompted(arrays, tokenizer, V, T)


@pytest.mark.parametrize("family,kind", [("llama", "decoder"), ("bert", "encoder")])
def test_a_soft_prompt_trains_alone_and_survives_saving(family, kind, request, tmp_path, caplog):
  model, params = request.getfixturevalue(family)
  tokenizer, arrays = encoded(kind)
  arrays = soft.prompted(arrays, tokenizer, V, S)
  batch = {"input_ids": arrays["input_ids"], "segment_ids": np.int32(np.arange(T) < arrays["length"][:, None]),
           "label": np.int32([i % 2 for i in range(20)]), "weight": np.ones(20, np.float32)}
  start = soft.with_soft_tokens(model, params, S, jax.random.key(0), tokenizer)
  losses, trained = train(model, start, ("soft",), batch)
  assert losses[-1] < losses[0] - 0.05
  moved = [path for path, leaf in flatten(trained).items() if (leaf != flatten(start)[path]).any()]
  prompt = "/".join((*model.vocabulary, "soft"))
  assert moved == [prompt]
  same(attach.merge(trained), trained)
  save_pretrained(tmp_path / "model", model, trained, card="A card.\n")
  again, loaded = load_pretrained(tmp_path / "model")
  same(loaded, trained)
  assert f"with the adapter in {FILE}, which transformers ignores" in caplog.text
  np.testing.assert_array_equal(logits(again, loaded, batch), logits(model, trained, batch))
  card = (tmp_path / "model/README.md").read_text()
  assert card.startswith("A card.\n") and "transformers ignores the file" in card
  mesh = sharding.make_mesh(2, 2, 2)
  same(load_pretrained(tmp_path / "model", mesh=mesh)[1], trained)
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
  save_pretrained(tmp_path / "plain", model, params)          # without a prompt there is neither adapter file nor card
  assert not (tmp_path / "plain" / FILE).exists() and not (tmp_path / "plain/README.md").exists()
  plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").state_dict()
  assert all((plain[name] == value).all() for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("change,match", [
    (lambda flat: flat.update({"embed_tokens/soft": np.ones((2, 31), np.float32)}),
     r"adapters do not fit .*embed_tokens/soft \(2, 31\), wanted \(tokens in 1..65536, 32\)"),
    (lambda flat: flat.update({"layers/attn/v_proj/gain": np.ones((3, 32), np.float32)}),
     r"adapters do not fit .*v_proj/gain \(3, 32\), wanted \(3, 16\)"),
    (lambda flat: flat.update({"embed_tokens/soft": np.ones((2, 32), np.float16)}), "not as .*/soft float16"),
    (lambda flat: flat.update({"score/gain": np.ones((3, 2), np.float32)}), "merge adapters first.*score/gain")])
def test_what_could_not_be_read_back_is_not_saved(change, match, llama, tmp_path, gain):
  flat = dict(flatten(llama[1]))
  change(flat)
  with pytest.raises(ValueError, match=match):
    save_pretrained(tmp_path / "model", llama[0], traverse_util.unflatten_dict(flat, sep="/"))
  assert not (tmp_path / "model").exists()
