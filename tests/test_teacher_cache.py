"""Cached teacher outputs are computed once, equal those in the training step, and are never another teacher's."""

import errno
import json
import os

import jax
import numpy as np
import pytest

from w2s_jax import InputError, sharding
from w2s_jax.data import tokenization
from w2s_jax.models import save_pretrained
from w2s_jax.training import inference, teacher_cache

TEXTS = ["a good day", "bad", "the film is not as bad as they say", "good good good"] * 3


@pytest.fixture
def rig(teacher, tmp_path):
  """get(texts, dtype, max_length) -> cached outputs. get.computed counts how often they were computed."""
  model, params = teacher
  tokenizer = tokenization.train(TEXTS, "encoder", 60)
  save_pretrained(tmp_path / "teacher", model, params, tokenizer)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  def get(texts=TEXTS, dtype="float32", max_length=12):
    def compute(empty):
      get.computed += 1
      arrays = tokenization.encode(tokenizer, texts, max_length)
      inference.outputs(model, params, arrays, mesh, batch_size=4, buckets=(8, 12), empty=empty)
    return teacher_cache.outputs(tmp_path / "cache", tmp_path / "teacher", texts, dtype, max_length, compute)
  get.computed, get.model, get.params, get.tokenizer = 0, model, params, tokenizer
  return get


def test_equal_to_the_teacher_in_the_step_and_computed_once(rig):
  first, again = rig(), rig()
  assert rig.computed == 1
  assert all(isinstance(x, np.memmap) and not x.flags.writeable for x in again.values())
  arrays = tokenization.encode(rig.tokenizer, TEXTS, 12)
  mask = (np.arange(12) < arrays["length"][:, None]).astype(np.int32)
  online = rig.model.apply(rig.params, arrays["input_ids"], mask)
  for got in (first, again):
    for name, want in (("logits", online.logits), ("features", online.features)):
      # Relative to the largest value, because CPUs add in different orders, and float32 rounds sums to that scale.
      np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-6 * np.abs(want).max(), err_msg=name)


def test_where_the_cache_cannot_be_written_they_stay_in_memory(rig, tmp_path, caplog):
  """The run goes on and warns, for example if the cache belongs to another user."""
  (tmp_path / "cache").touch()                            # root may write every directory, but not below a file
  got = rig()
  assert f"{tmp_path / 'cache'} cannot be written (" in caplog.text
  (tmp_path / "cache").unlink()
  kept = rig()
  assert rig.computed == 2 and not isinstance(got["logits"], np.memmap)
  for name, values in kept.items():
    np.testing.assert_array_equal(got[name], values)


def test_a_full_disk_is_an_error_and_leaves_nothing(rig, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  monkeypatch.setattr(os, "posix_fallocate", full)
  with pytest.raises(OSError, match="No space left on device"):
    rig()
  assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("change", [dict(texts=TEXTS[::-1]), dict(max_length=8), dict(dtype="bfloat16")])
def test_another_key_is_another_computation(rig, change):
  rig()
  rig(**change)
  assert rig.computed == 2


def test_other_weights_or_another_tokenizer_too(rig, teacher, tmp_path):
  rig()
  model, params = teacher
  save_pretrained(tmp_path / "teacher", model, jax.tree.map(lambda x: x + 1, params), rig.tokenizer)
  rig()
  tokenization.train(TEXTS, "encoder", 40).save_pretrained(tmp_path / "teacher")
  rig()
  assert rig.computed == 3


def other_rows(directory):
  np.save(directory / "logits.npy", np.zeros((3, 2), np.float32))


def other_values(directory):
  np.save(directory / "features.npy", np.load(directory / "features.npy") + 1)


def other_key(directory):
  content = json.loads((directory / "key.json").read_text())
  content["key"]["dtype"] = "int8"
  (directory / "key.json").write_text(json.dumps(content))


def cut_off(directory):
  (directory / "logits.npy").write_bytes((directory / "logits.npy").read_bytes()[:50])


def pickled(directory):
  np.save(directory / "logits.npy", np.array([{}]), allow_pickle=True)


@pytest.mark.parametrize("change", [other_rows, other_values, other_key, cut_off, pickled,
                                    lambda directory: (directory / "key.json").unlink()])
def test_a_stale_or_foreign_cache_is_an_error(rig, change, tmp_path):
  rig()
  directory, = (tmp_path / "cache").iterdir()
  change(directory)
  with pytest.raises(InputError, match=r"does not hold this teacher's outputs \(.*delete it"):
    rig()


def test_a_computation_that_fails_leaves_nothing_that_counts(rig, tmp_path):
  def fail(empty):
    empty("logits", (12, 2))
    raise MemoryError
  with pytest.raises(MemoryError):
    teacher_cache.outputs(tmp_path / "cache", tmp_path / "teacher", TEXTS, "float32", 12, fail)
  assert not list((tmp_path / "cache").iterdir())
  np.testing.assert_array_equal(rig()["logits"].shape, (12, 2))
  assert rig.computed == 1
