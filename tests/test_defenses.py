"""What each defense's loss depends on, and what it must not depend on. B rows, T tokens."""

import functools

import jax
import numpy as np
import pytest
import rig

from w2s_jax import InputError, losses, results
from w2s_jax.adapters import trees
from w2s_jax.defenses import ABLATIONS, DEFENSES, Defense, Suspect, anchors, lora_ce, w2s, w2s_released
from w2s_jax.training import steps

WEIGHTS = {"ce": 1.0, "kd": 1.0, "fa": 0.1}


@functools.cache
def jitted_loss(model, terms, weights, forward):
  run = functools.partial(forward, settings=rig.DEFENSE) if forward else steps.forward
  return jax.jit(steps.weighted_loss(model, rig.terms(terms), dict(weights), run))


def value(model, params, batch, terms, weights=None, forward=None):
  """(loss, {term: value}) of the defense as the training step computes them."""
  trainable, frozen = trees.split(params, trees.LORA)
  loss = jitted_loss(model, terms, tuple((weights or WEIGHTS).items()), forward)
  return loss(trainable, frozen, batch, jax.random.key(0))


RECIPES = {name: defense.recipe for name, defense in DEFENSES.items() if defense.recipe}


def weights_of(name):
  """{term: weight} of the defense for a student of width 32."""
  return RECIPES[name].weights(rig.DEFENSE, 32)


def whole(batch, name, model):
  """The batch with the arrays that the defense adds, and with every second text marked as having soft tokens."""
  (B, T), fields, rng = batch["input_ids"].shape, RECIPES[name].fields, np.random.default_rng(0)
  own = {field: rng.random((B, *shape), np.float32) for field, shape in fields(model, T).items()} if fields else {}
  return batch | {"soft": (np.arange(B) % 2).astype(np.float32)} | own


def longer(batch, tokens, left=False):
  """The same rows with `tokens` more padding tokens, on the left or on the right."""
  pad = ((0, 0), (tokens, 0) if left else (0, tokens))
  return batch | {name: np.pad(batch[name], pad) for name in ("input_ids", "segment_ids")}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_w2s_does_not_depend_on_row_order(family, request, make_batch):
  model, params = request.getfixturevalue(family)
  batch = make_batch(model)
  want, _ = value(model, params, batch, w2s.terms)
  for order in (np.arange(8)[::-1], np.roll(np.arange(8), 3)):
    got, _ = value(model, params, {k: v[order] for k, v in batch.items()}, w2s.terms)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("family,left", [("llama", False), ("llama", True), ("bert", False)])
def test_w2s_does_not_depend_on_padding(family, left, request, make_batch):
  model, params = request.getfixturevalue(family)
  batch = make_batch(model)
  want, _ = value(model, params, batch, w2s.terms)
  for tokens in (1, 9):
    np.testing.assert_allclose(value(model, params, longer(batch, tokens, left), w2s.terms)[0], want, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_w2s_released_depends_on_both(family, request, make_batch):
  """The order of the rows and the amount of padding each change its feature term by more than 5%."""
  model, params = request.getfixturevalue(family)
  batch = make_batch(model, rows=2)
  at_padding = model.apply(params, batch["input_ids"], batch["segment_ids"]).hidden[-1, -1]
  batch["teacher_features"][-1] = at_padding                   # near to states at padding, far from other states
  want = value(model, params, batch, w2s_released.terms)[1]["fa"]
  reversed_rows = value(model, params, {k: v[::-1] for k, v in batch.items()}, w2s_released.terms)[1]
  padded = value(model, params, longer(batch, 36), w2s_released.terms)[1]
  assert abs(reversed_rows["fa"] / want - 1) > 0.05
  assert abs(padded["fa"] / want - 1) > 0.05
  own = value(model, params, batch, w2s.terms)[1]              # its other terms are those of w2s
  np.testing.assert_allclose([reversed_rows["ce"], padded["kd"]], [own["ce"], own["kd"]], rtol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_filler_rows_change_nothing(name, llama, make_batch):
  """A short batch filled up with copies at weight 0 gives the value of the short batch itself."""
  model, params = llama
  batch = whole(make_batch(model), name, model)
  short = {k: v[:5] for k, v in batch.items()}
  filled = {k: np.concatenate([v[:5], v[:1], v[:1], v[:1]]) for k, v in batch.items()}
  filled["weight"] = np.array([1.0] * 5 + [0.0] * 3, np.float32)
  recipe = RECIPES[name]
  want, got = (value(model, params, b, recipe.terms, weights_of(name), recipe.forward)[0] for b in (short, filled))
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_w2s_released_is_the_released_arithmetic_on_a_model(llama, make_batch):
  model, params = llama
  batch = make_batch(model)
  hidden = np.asarray(model.apply(params, batch["input_ids"], batch["segment_ids"]).hidden, np.float64)
  want = np.square(hidden - batch["teacher_features"][-1]).sum(-1).mean()
  np.testing.assert_allclose(value(model, params, batch, w2s_released.terms)[1]["fa"], want, rtol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_terms_have_the_names_of_their_weights_and_make_up_the_loss(name, llama, make_batch):
  model, params = llama
  weights = weights_of(name)
  recipe, batch = RECIPES[name], whole(make_batch(model), name, model)
  total, terms = value(model, params, batch, recipe.terms, weights, recipe.forward)
  assert set(terms) == set(weights)
  np.testing.assert_allclose(total, sum(weights[k] * terms[k] for k in weights), rtol=1e-6)


def test_the_control_reads_no_teacher(llama, make_batch):
  model, params = llama
  batch = {k: v for k, v in make_batch(model).items() if not k.startswith("teacher")}
  total, terms = value(model, params, batch, lora_ce.terms, {"ce": 1.0})
  out = model.apply(params, batch["input_ids"], batch["segment_ids"])
  np.testing.assert_allclose(total, losses.cross_entropy(out.logits, batch["label"]), rtol=1e-6)


def test_the_dict_of_defenses():
  """`none` is the suspect itself. Only ablations give an example another target than its own teacher output."""
  anchored = ["w2s_adv_shuffled", "w2s_adv_within", "w2s_adv_means", "w2s_adv_orthogonal"]
  ablations = ["w2s_shuffled", "ce_adv", *anchored]
  distilled = ["lora_ce", "full_ft", "w2s_full", "w2s_words", "from_base", "from_base_words", "w2s",
               "w2s_released", "w2s_adv"]
  assert {"none", *distilled, "prune", "onion", "strip", *ablations} <= set(DEFENSES)
  assert list(ABLATIONS) == ["w2s_shuffled", "ce_adv", *anchored]
  assert DEFENSES["none"] == Defense()
  recipes = {name: RECIPES[name] for name in [*distilled, *ablations]}              # a new defense changes nothing here
  views = {name: recipe.teacher_view for name, recipe in recipes.items()}
  assert [n for n, view in views.items() if view not in (None, anchors.own)] == ["w2s_shuffled", *anchored]
  assert [n for n, view in views.items() if view is None] == ["lora_ce", "full_ft", "from_base", "from_base_words",
                                                                 "ce_adv"]
  assert [n for n, r in recipes.items() if r.from_base] == ["from_base", "from_base_words"]
  assert all(results.is_from_base(name) == bool(d.recipe and d.recipe.from_base) for name, d in DEFENSES.items())
  assert [n for n, r in recipes.items() if r.trains == trees.FULL] == ["full_ft", "w2s_full", "w2s_words"]
  assert [n for n, r in recipes.items() if r.views == 2] == ["w2s_adv", "ce_adv", *anchored]
  assert [n for n, r in recipes.items() if r.rows] == ["w2s_words", "from_base_words"]
  assert RECIPES["w2s_shuffled"].terms is RECIPES["w2s"].terms     # the same loss: only the pairing differs
  assert not {name for name in Suspect._fields if "trigger" in name or "attack" in name}


def outputs(n, labels):
  """Teacher outputs that identify their row: features [N, 8] are its number, logits [N, 3] show its class."""
  return {"teacher_features": np.repeat(np.arange(n, dtype=np.float32)[:, None], 8, axis=1),
          "teacher_logits": np.eye(3, dtype=np.float32)[labels] * 7}


@pytest.mark.parametrize("n", [16, 100, 4000])
@pytest.mark.parametrize("anchor", [anchors.shuffled, anchors.shuffled_within_classes])
def test_shuffled_outputs_are_a_fixed_permutation(n, anchor):
  labels = np.random.default_rng(n).integers(3, size=n)
  def whose(seed):
    out = anchor(outputs(n, labels), labels, seed)
    rows = out["teacher_features"][:, 0].astype(int)
    np.testing.assert_array_equal(out["teacher_logits"].argmax(-1), labels[rows])     # logits move with the features
    return rows
  rows = whose(3)
  np.testing.assert_array_equal(np.sort(rows), np.arange(n))
  np.testing.assert_array_equal(rows, whose(3))
  assert (rows != whose(4)).any()
  assert (rows != np.arange(n)).mean() > 0.7                       # few rows keep their own output
  assert (labels[rows] == labels).all() == (anchor is anchors.shuffled_within_classes)


def test_class_means_and_orthogonal_directions_are_of_the_class_alone():
  labels = np.array([2, 0, 2, 1, 0])
  out = anchors.class_means(outputs(5, labels), labels, seed=0)
  np.testing.assert_array_equal(out["teacher_features"][:, 3], [1, 2.5, 1, 3, 2.5])
  np.testing.assert_array_equal(out["teacher_logits"], 7 * np.eye(3)[labels])
  out = anchors.orthogonal(outputs(5, labels), labels, seed=0)
  features = out["teacher_features"]
  same = labels[:, None] == labels
  np.testing.assert_allclose(features @ features.T, 8.0 * same, atol=1e-5)
  np.testing.assert_array_equal(out["teacher_logits"], 4 * np.eye(3)[labels])
  assert (anchors.orthogonal(outputs(5, labels), labels, seed=1)["teacher_features"] != features).any()


@pytest.mark.parametrize("name,triple", [
    ("released_badnet", (5.0, 0.001, 0.001)), ("released_insent", (3.0, 0.01, 0.001)),
    ("released_synattack", (1.0, 0.035, 0.002))])
def test_released_triples_stay_as_they_are_at_width_4096(name, triple):
  assert tuple(w2s.loss_weights(name, 4096).values()) == triple
  assert list(w2s.loss_weights(name, 4096)) == ["ce", "kd", "fa"]


def test_the_feature_weight_scales_with_4096_over_width():
  """The feature loss sums over the width; cross entropy and distillation do not."""
  for width, scale in ((4096, 1), (2048, 2), (64, 64), (8192, 0.5)):
    got = w2s.loss_weights("released_badnet", width)
    np.testing.assert_allclose([got["ce"], got["kd"], got["fa"]], [5.0, 0.001, 0.001 * scale], rtol=1e-12)
    assert w2s.loss_weights("1,2,3", width) == {"ce": 1.0, "kd": 2.0, "fa": 3.0 * scale}


@pytest.mark.parametrize("name, weights", [
    ("released_badnet", (5, 0.001, 0.001)), ("released_insent", (3, 0.01, 0.001)),
    ("released_synattack", (1, 0.035, 0.002)), ("agnostic", (3, 0.01, 0.001)), ("small", (1, 1, 0.01))])
def test_named_weights_of_the_losses(name, weights):
  """The weights hold for a width of 4096. At half the width the weight of feature alignment is twice as large."""
  ce, kd, fa = weights
  assert w2s.loss_weights(name, 4096) == {"ce": ce, "kd": kd, "fa": fa}
  assert w2s.loss_weights(name, 2048) == {"ce": ce, "kd": kd, "fa": 2 * fa}


def test_three_numbers_as_text():
  assert w2s.loss_weights("0.5, 1e-2,0", 4096) == {"ce": 0.5, "kd": 0.01, "fa": 0.0}


@pytest.mark.parametrize("bad", ["released", "1,2", "1,2,3,4", "1,x,3", "", "1,-2,3", "nan,1,1", "1,inf,1"])
def test_other_weights_are_an_error_that_lists_the_names(bad):
  with pytest.raises(InputError, match=r"loss weights .*released_badnet.*CE,KD,FA.*--config\.defense\.w2s\.weights"):
    w2s.loss_weights(bad, 64)
