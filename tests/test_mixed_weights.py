"""Defenses that mix a public base into the suspect: `merge`, `lethe` and `fine_mix`."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rig
import scipy.spatial
import transformers
from cli import CONFIG, SHORT, before_the_defenses, w2s_forked
from flax import traverse_util
from safetensors.numpy import load_file
from test_from_base import CLEANING

from w2s_jax import InputError
from w2s_jax.adapters import attach, trees
from w2s_jax.data import tokenization
from w2s_jax.defenses import DEFENSES, base, distill, fine_mix, lethe, merge
from w2s_jax.models import Model


@pytest.fixture
def suspect(llama, tmp_path):
  """A suspect with a public base that has other weights and another head."""
  own = rig.suspect(*llama, tmp_path)
  return own._replace(base=lambda: (own.model, own.model.init(jax.random.key(9)), own.tokenizer))


def settings(**sections):
  out = rig.DEFENSE.copy_and_resolve_references()
  for name, values in sections.items():
    out[name].update(values)
  return out


def flat(params):
  return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def merged(suspect, **values):
  return flat(merge.weights(suspect, settings(merge=values), {"merge": 0})[0])


def with_head(suspect, mix):
  """{path: mix(suspect's leaf, base's leaf)}, with the suspect's head."""
  ours, public = flat(suspect.params), flat(suspect.base()[1])
  return {path: ours[path] if path == "score/kernel" else mix(ours[path], public[path]) for path in ours}


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_the_ends_are_the_suspect_and_the_base_with_the_suspects_head(method, suspect):
  for share, end in ((0.0, lambda ours, public: ours), (1.0, lambda ours, public: public)):
    got = merged(suspect, share=share, method=method)
    for path, wanted in with_head(suspect, end).items():
      np.testing.assert_allclose(got[path], wanted, rtol=1e-6, err_msg=path)
  assert not np.array_equal(flat(suspect.params)["score/kernel"], flat(suspect.base()[1])["score/kernel"])


def test_linear_is_the_weighted_mean(suspect):
  got = merged(suspect, share=0.25, method="linear")
  for path, wanted in with_head(suspect, lambda ours, public: 0.75 * ours + 0.25 * public).items():
    np.testing.assert_allclose(got[path], wanted, rtol=1e-5, atol=1e-7, err_msg=path)


def test_slerp_is_of_each_layers_tensors(suspect):
  """Leaves of the layers are stacked; the table of embeddings is one tensor."""
  got = merged(suspect, share=0.25, method="slerp")
  def by_layer(ours, public):
    return np.stack([merge.slerp(*pair, 0.25) for pair in zip(ours, public)])
  wanted = {path: by_layer(*pair) if path.startswith("layers/") else merge.slerp(*pair, 0.25)
            for path, pair in with_head(suspect, lambda ours, public: (ours, public)).items()
            if path != "score/kernel"}
  for path in wanted:
    np.testing.assert_allclose(got[path], wanted[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("angle", [1e-3, 0.1, 1.5, 3.0])
def test_slerp_of_unit_vectors_is_scipys(angle):
  start, end = np.array([1.0, 0.0, 0.0]), np.array([np.cos(angle), np.sin(angle), 0.0])
  for share in (0.1, 0.5, 0.9):
    wanted = scipy.spatial.geometric_slerp(start, end, share)
    np.testing.assert_allclose(merge.slerp(jnp.array(start), jnp.array(end), share), wanted, rtol=1e-4, atol=1e-6)


def test_slerp_without_an_arc_is_linear():
  v = jnp.array([[3.0, -4.0], [0.0, 1.0]])
  for end in (v, 2 * v, -v, 0 * v):
    np.testing.assert_allclose(merge.slerp(v, end, 0.25), 0.75 * v + 0.25 * end, rtol=1e-6)
    np.testing.assert_allclose(merge.slerp(end, v, 0.25), 0.75 * end + 0.25 * v, rtol=1e-6)


def started(suspect, kept, seed=0):
  params, arrays = fine_mix.start(suspect, settings(fine_mix={"kept": kept}), suspect.params, {"x": 1}, seed)
  assert arrays == {"x": 1}
  return flat(params)


def test_each_weight_is_the_suspects_or_the_bases(suspect):
  """The suspect's share is within 0.02 of 0.7, which for 15,000 weights is over five standard deviations."""
  ours, public = flat(suspect.params), flat(suspect.base()[1])
  got, again, other = (started(suspect, 0.7, seed) for seed in (0, 0, 1))
  stays = {path: got[path] == ours[path] for path in ours}
  assert all((stays[path] | (got[path] == public[path])).all() for path in ours) and stays["score/kernel"].all()
  body = np.concatenate([stays[path].ravel() for path in ours if path != "score/kernel"])
  assert body.size > 15_000 and abs(body.mean() - 0.7) < 0.02
  stacked = stays["layers/attn/q_proj/kernel"]
  assert (stacked[0] != stacked[1]).any()                                    # each layer draws its own weights
  assert any((other[path] != got[path]).any() for path in got)
  jax.tree.map(np.testing.assert_array_equal, got, again)
  for kept, end in ((1.0, lambda ours, public: ours), (0.0, lambda ours, public: public)):
    jax.tree.map(np.testing.assert_array_equal, started(suspect, kept), with_head(suspect, end))


def test_fine_mix_of_several_seeds_starts_each_from_its_own_mixture(suspect):
  """A learning rate of 1e-20 does not change float32 parameters."""
  suspect.training.update(learning_rate=1e-20, max_steps=2)
  of_seeds = distill.train(fine_mix.RECIPE, suspect, settings(fine_mix={"kept": 0.5}), {"fine_mix": 0, "other": 1})
  for seed, params in enumerate(of_seeds):
    jax.tree.map(np.testing.assert_array_equal, flat(params), started(suspect, 0.5, seed))


def test_fine_mix_without_a_mixture_is_full_fine_tuning(suspect):
  suspect.training.update(max_steps=4)
  mixed, = distill.train(fine_mix.RECIPE, suspect, settings(fine_mix={"kept": 1.0}), {"fine_mix": 0})
  plain, = distill.train(DEFENSES["full_ft"].recipe, suspect, settings(), {"full_ft": 0})
  jax.tree.map(np.testing.assert_array_equal, mixed, plain)


def test_a_base_of_another_shape_or_vocabulary_is_refused(suspect):
  model, tokenizer = suspect.model, suspect.tokenizer
  base.check(model, tokenizer, model, tokenizer)
  wider = Model(dataclasses.replace(model.config, intermediate_size=56))
  with pytest.raises(InputError, match=r"layers/mlp/down_proj/kernel has the shape \(3, 56, 32\), the suspect's "
                                       r"\(3, 48, 32\): set --config.student.base to"):
    base.check(model, tokenizer, wider, tokenizer)
  other = tokenization.train(["qux zork"] * 9, "decoder", model.config.vocab_size)
  with pytest.raises(InputError, match=r"its token '.*' has another id in the suspect's vocabulary, or none: set"):
    base.check(model, tokenizer, model, other)
  more_classes = Model(dataclasses.replace(model.config, num_labels=7))
  base.check(model, tokenizer, more_classes, tokenizer)                      # the head is not mixed
  assert trees.split(suspect.params, base.BODY)[1].keys() == {"score"}


def test_a_student_that_we_poison_is_merged_with_its_base(tiny_run, tmp_path):
  """`merge` gives the base's bits with the poisoned head. `fine_mix`, not trained, gives a random mixture of both."""
  new = before_the_defenses(tiny_run, tmp_path / "w")
  out = w2s_forked(CONFIG, *SHORT, f"--workdir={new}", "--config.defenses=merge,fine_mix", "--stage=defend",
                   "--config.defense.merge.share=1.0", "--config.defend.learning_rate=1e-20")
  assert out.returncode == 0, out.stderr
  ours, public, merged, mixed = (load_file(new / f"models/{name}/model.safetensors")
                                 for name in ("poisoned", "base", "merge", "fine_mix"))
  for name in ours:
    np.testing.assert_array_equal(merged[name], (ours if name == "score.weight" else public)[name], err_msg=name)
    assert ((mixed[name] == ours[name]) | (mixed[name] == public[name])).all(), name
  stays = np.concatenate([(mixed[name] == ours[name])[ours[name] != public[name]] for name in ours])
  assert 0.4 < stays.mean() < 0.6


@pytest.mark.parametrize("defense", ["merge", "fine_mix"])
def test_a_given_suspect_without_a_base_is_refused(defense, tiny_run, tmp_path):
  out = w2s_forked(*CLEANING, f"--config.student.path={tiny_run / 'models/poisoned'}", f"--workdir={tmp_path / 'w'}",
                   f"--config.defenses={defense}")
  assert out.returncode == 2 and f"defense '{defense}' needs a public model: set --config.student.base" in out.stderr
  assert len(out.stderr.splitlines()) == 1 and not (tmp_path / "w").exists()


def test_a_given_suspect_with_a_base_of_another_width_is_refused(tiny_run, tmp_path):
  wide = shutil.copytree(tiny_run / "models/base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
  hf = json.loads((wide / "config.json").read_text())
  config = transformers.AutoConfig.for_model(**(hf | {"intermediate_size": hf["intermediate_size"] + 8}))
  transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(wide)
  out = w2s_forked(*CLEANING, f"--config.student.path={tiny_run / 'models/poisoned'}", f"--workdir={tmp_path / 'w'}",
                   f"--config.student.base={wide}", "--config.defenses=merge")
  assert out.returncode == 2 and "the public base cannot be mixed into the suspect: layers/mlp/" in out.stderr
  assert not (tmp_path / "w").exists()


def lethe_of(suspect, **values):
  own = settings(lethe=values)
  return flat(DEFENSES["lethe"].weights(suspect, own, {"lethe": 0})[0])


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_the_ends_of_lethe_are_the_suspect_and_the_clean_model(method, suspect):
  """The clean model is that of `from_base`, with its head."""
  suspect.training.update(max_steps=4)
  model, params, tokenizer = suspect.base()
  of_base = suspect._replace(model=model, params=params, tokenizer=tokenizer)
  clean, = distill.train(DEFENSES["from_base"].recipe, of_base, settings(), {"from_base": 0})
  for share, wanted in ((0.0, suspect.params), (1.0, attach.merge(clean))):
    got = lethe_of(suspect, share=share, method=method)
    for path, leaf in flat(wanted).items():
      np.testing.assert_allclose(got[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)


def test_ties_keeps_the_largest_changes_that_agree_in_sign():
  """Half of each model's four changes are kept. Those of equal sign are averaged; of opposite signs the larger wins."""
  public = jnp.array([1.0, 1.0, 1.0, 1.0])
  ours = public + jnp.array([0.4, 0.1, -0.8, 0.0])          # keeps 0.4 and -0.8
  clean = public + jnp.array([0.2, 0.3, 0.0, 0.1])          # keeps 0.2 and 0.3
  np.testing.assert_allclose(lethe.ties(ours, clean, public, 0.5), [1.3, 1.3, 0.2, 1.0], rtol=1e-6)
  opposite = public + jnp.array([0.2, 0.0, 0.3, 0.0])       # at the third weight -0.8 wins over 0.3
  np.testing.assert_allclose(lethe.ties(ours, opposite, public, 0.5), [1.3, 1.0, 0.2, 1.0], rtol=1e-6)
  np.testing.assert_allclose(lethe.ties(ours, ours, public, 1.0), ours, rtol=1e-6)


def test_ties_of_the_suspect_with_the_untrained_base_is_the_suspect(suspect):
  """A clean model that did not train has no changes, so only the suspect's are kept."""
  suspect.training.update(max_steps=1, learning_rate=1e-20)
  got = lethe_of(suspect, method="ties", density=1.0)
  for path, leaf in flat(suspect.params).items():
    np.testing.assert_allclose(got[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)
