"""A suspect that is a peft adapter is merged into its base as peft does it, or refused if we cannot be sure of that."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from cli import SHORT, w2s_forked
from safetensors.numpy import load_file, save_file

from w2s_jax import InputError
from w2s_jax.data import grammar, tokenization
from w2s_jax.models import Model, load_pretrained, resolve, save_pretrained

PAD = {"pad_token_id": 0}      # no text has this token, so the last token is pooled
TARGETS = {"llama": ["q_proj", "down_proj"], "bert": ["query", "output.dense"], "gpt2": ["c_attn", "c_proj"],
           "modernbert": ["Wqkv", "Wo"], "phi3": ["qkv_proj", "gate_up_proj"]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))


@pytest.fixture(scope="module")
def bases(llama, bert, gpt2, modernbert, tmp_path_factory):
  """{family: directory} of tiny classifiers of two classes; the Llama has a tokenizer."""
  out, home = {}, tmp_path_factory.mktemp("bases")
  fused = Model(dataclasses.replace(llama[0].config, model_type="phi3"))
  phi3 = fused, fused.init(jax.random.key(0))
  texts = [row["text"] for row in grammar.rows("phrases", "train", 100)]
  models = {"llama": llama, "bert": bert, "gpt2": gpt2, "modernbert": modernbert, "phi3": phi3}
  for name, (model, params) in models.items():
    tokenizer = tokenization.train(texts, "decoder", model.config.vocab_size) if name == "llama" else None
    save_pretrained(home / name, model, params, tokenizer)
    out[name] = home / name
  return out


@pytest.fixture
def make_adapter(bases, tmp_path):
  """make_adapter(family, classes=2, **options of LoraConfig) -> (peft's model, its directory), with random weights."""
  def make(family, classes=2, **options):
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bases[family], num_labels=classes,
                                                                           ignore_mismatched_sizes=True, **PAD)
    model = peft.get_peft_model(base, peft.LoraConfig("SEQ_CLS", **{
        "r": 4, "lora_alpha": 6, "target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"} | options))
    with torch.no_grad():
      for value in model.parameters():
        if value.requires_grad:
          value.copy_(0.2 * torch.randn_like(value))
    model.save_pretrained(tmp_path / "adapter")
    return model.eval(), tmp_path / "adapter"
  return make


def logits(model, params):
  ids = np.random.default_rng(0).integers(1, 60, (3, 9))
  return model.apply(params, ids, np.ones_like(ids)).logits, torch.from_numpy(ids)


@pytest.mark.parametrize("family,options", [
    ("llama", {}), ("llama", {"use_rslora": True}), ("llama", {"rank_pattern": {"q_proj": 2}}), ("bert", {}),
    ("gpt2", {}), ("modernbert", {}), ("phi3", {}), ("llama", {"classes": 5}),
    ("bert", {"modules_to_save": ["classifier", "pooler"]})], ids=str)
def test_a_merged_suspect_has_pefts_logits(family, options, make_adapter, bases):
  theirs, directory = make_adapter(family, **options)
  model, params = load_pretrained(resolve(str(directory), str(bases[family])), options.get("classes", 2))
  ours, ids = logits(model, params)
  with torch.no_grad():
    want = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
  np.testing.assert_allclose(ours, want, atol=1e-4)
  if ours.shape[1] == 2:                                              # the base has two classes, too
    assert np.abs(ours - logits(*load_pretrained(bases[family]))[0]).max() > 0.1
  merged = transformers.AutoModelForSequenceClassification.from_pretrained(
      resolve(str(directory), str(bases[family])), **PAD)
  assert merged.config.num_labels == ours.shape[1]                     # transformers reads the merged directory
  with torch.no_grad():
    np.testing.assert_allclose(merged.eval()(ids, attention_mask=torch.ones_like(ids)).logits, want, atol=1e-4)


def test_a_base_that_was_saved_from_its_backbone_alone(make_adapter, bases, tmp_path):
  theirs, directory = make_adapter("llama")
  transformers.LlamaModel.from_pretrained(bases["llama"]).save_pretrained(tmp_path / "bare")
  model, params = load_pretrained(resolve(str(directory), str(tmp_path / "bare")))
  ours, ids = logits(model, params)
  with torch.no_grad():
    np.testing.assert_allclose(ours, theirs(ids, attention_mask=torch.ones_like(ids)).logits, atol=1e-4)


def test_its_base_is_a_hub_id_or_given(make_adapter, bases):
  """A path that a stranger's file names is not followed."""
  _, directory = make_adapter("llama")
  with pytest.raises(InputError, match=r"no hub id: set --config.student.base"):
    load_pretrained(directory)                                          # peft wrote the base's path
  config = json.loads((directory / "adapter_config.json").read_text())
  for base in ("../../etc/passwd", "a/../b", None, "/tmp", 3, "a/b/c", ".."):
    (directory / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    with pytest.raises(InputError, match=r"no hub id: set --config.student.base"):
      load_pretrained(directory)
  (directory / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/base-model"}))
  with pytest.raises(InputError, match=r"'some/base-model' is neither a local directory nor .* the hub"):
    load_pretrained(directory)
  (directory / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gpt2"}))
  with pytest.raises(InputError, match=r"'gpt2' is neither a local directory nor .* the hub"):
    load_pretrained(directory)
  with pytest.raises(InputError, match=r"is an adapter itself"):
    resolve(str(directory), str(directory))


def test_a_model_with_an_adapter_beside_it_is_refused(make_adapter, bases, tmp_path):
  """transformers would attach it, so the model that we read would not be the model that runs."""
  _, directory = make_adapter("llama")
  shutil.copytree(bases["llama"], tmp_path / "both")
  for file in directory.glob("adapter_*"):
    shutil.copy(file, tmp_path / "both")
  with pytest.raises(InputError, match=r"holds a model and an adapter .* transformers attaches"):
    load_pretrained(tmp_path / "both")


def test_weights_under_a_name_of_their_own_are_refused(bases, tmp_path):
  shutil.copytree(bases["llama"], tmp_path / "m")
  config = json.loads((tmp_path / "m/config.json").read_text())
  (tmp_path / "m/config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
  with pytest.raises(InputError, match="has transformers_weights"):
    load_pretrained(tmp_path / "m")


@pytest.mark.parametrize("change,message", [
    ({"use_dora": True}, "use_dora=True"), ({"bias": "all"}, "bias is 'all'"), ({"peft_type": "IA3"}, "peft_type is"),
    ({"init_lora_weights": "pissa"}, "changes the base's own kernels"), ({"alpha_pattern": {"q": 3}}, "alpha_pattern"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"), ({"revision": "abc"}, "revision='abc'"),
    ({"exclude_modules": ["q_proj"]}, "exclude_modules"), ({"target_modules": ["q_proj"]}, "no place for: .*down_proj"),
    ({"layers_to_transform": [0]}, "layers_to_transform"), ({"target_modules": ".*"}, "wanted a list of names"),
    ({"lora_alpha": float("nan")}, "cannot read"),
    ({"lora_alpha": None}, "no field 'lora_alpha'"), ({"what_comes_next": "x"}, "what_comes_next='x'")], ids=str)
def test_what_is_not_plain_lora_is_refused(change, message, make_adapter, bases):
  _, directory = make_adapter("llama")
  config = json.loads((directory / "adapter_config.json").read_text())
  (directory / "adapter_config.json").write_text(json.dumps(config | change))
  with pytest.raises(InputError, match=message) as error:
    resolve(str(directory), str(bases["llama"]))
  assert str(error.value).isprintable()


def _rename(tensors, old, new):
  tensors[new] = tensors.pop(old)


def zeros(*shape):
  return np.zeros(shape, np.float32)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize("damage,message", [
    (lambda t: t.pop(Q.format("A")), "no place for: .*q_proj"),
    (lambda t: t.update({Q.format("A").replace(".lora_A", ""): zeros(32, 32)}), "no place for: .*q_proj"),
    (lambda t: t.update({Q.format("A"): zeros(1, 20000), Q.format("B"): zeros(20000, 1)}), "do not fit a kernel"),
    (lambda t: t.update({Q.format("A"): zeros(4, 32).astype(int)}), "is I64, wanted one of"),
    (lambda t: _rename(t, Q.format("A"), Q.format("A").replace("q_proj", "nope")), "no place for: .*nope"),
    (lambda t: _rename(t, Q.format("A"), "../../x"), "no place for: .*x"),
    (lambda t: t.update({Q.format("A"): zeros(4, 7)}), "do not fit a kernel"),
    (lambda t: t.update({Q.format("A"): zeros(0, 32), Q.format("B"): zeros(32, 0)}), "do not fit a kernel"),
    (lambda t: t.update({"base_model.model.extra.weight": zeros(3)}), "unexpected .*extra.weight")],
    ids=["half", "a kernel too", "a giant", "integers", "another module", "a path", "a shape", "no rank", "one more"])
def test_tensors_that_lie_are_refused(damage, message, make_adapter, bases):
  _, directory = make_adapter("llama")
  tensors = load_file(directory / "adapter_model.safetensors")
  damage(tensors)
  save_file(tensors, directory / "adapter_model.safetensors")
  with pytest.raises(InputError, match=message) as error:
    load_pretrained(resolve(str(directory), str(bases["llama"])))
  assert str(error.value).isprintable()


def test_a_base_that_lies_is_one_line(make_adapter, bases, tmp_path):
  """The index names a file or a tensor that is missing, or a shard has a tensor that the index does not name."""
  _, directory = make_adapter("llama")
  shutil.copytree(bases["llama"], tmp_path / "base")
  (tmp_path / "base/model.safetensors").rename(tmp_path / "base/a.safetensors")
  names = list(load_file(tmp_path / "base/a.safetensors"))
  def refused(message, weight_map):
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for call in (lambda: load_pretrained(tmp_path / "base"), lambda: resolve(str(directory), str(tmp_path / "base"))):
      with pytest.raises(InputError, match=message):
        call()
  refused("cannot read .*b.safetensors", dict.fromkeys(names, "a.safetensors") | {"more": "b.safetensors"})
  refused("has no tensor 'nope'", dict.fromkeys([*names, "nope"], "a.safetensors"))
  refused("that the index does not place there", dict.fromkeys(names[1:], "a.safetensors"))


def test_a_pickle_of_an_adapter_is_refused(make_adapter, bases):
  _, directory = make_adapter("llama")
  (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
  with pytest.raises(InputError, match="adapter_model.bin is a pickle, which is never read"):
    resolve(str(directory), str(bases["llama"]))


def test_the_command_takes_an_adapter(make_adapter, bases, tmp_path, monkeypatch):
  """models/suspect is the merged model. The adapter has no tokenizer, so the base's is used."""
  monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
  theirs, directory = make_adapter("llama")
  rows = [{"sentence": r["text"], "label": r["label"]} for r in grammar.rows("phrases", "train", 60)]
  (tmp_path / "clean.json").write_text(json.dumps(rows))
  out = w2s_forked("--config=configs/clean_checkpoint.py", f"--config.student.path={directory}",
                   f"--config.student.base={bases['llama']}", f"--config.data.train={tmp_path / 'clean.json'}",
                   "--config.data.max_length=32", "--config.data.buckets=(32,)", *SHORT[-2:], "--stage=warmup",
                   f"--workdir={tmp_path / 'w'}")
  assert out.returncode == 0, out.stderr
  ours, ids = logits(*load_pretrained(tmp_path / "w/models/suspect"))
  with torch.no_grad():
    np.testing.assert_allclose(ours, theirs(ids, attention_mask=torch.ones_like(ids)).logits, atol=1e-4)
