"""How several processes share work. They are simulated here; test_launch.py starts real ones."""

import jax
import numpy as np
import pytest

from w2s_jax import processes


@pytest.mark.parametrize("count,items", [(1, 3), (2, 1), (2, 5), (3, 6), (5, 2)])
def test_a_share_each_makes_the_whole(count, items, monkeypatch):
  """Every process gets all items in order, even if items are fewer than processes. Each makes at most its share."""
  def make(numbers):
    assert len(numbers) <= -(-items // count)
    return {"n": np.array(numbers), "twice": np.array([[n, n] for n in numbers])}
  monkeypatch.setattr(jax, "process_count", lambda: count)
  def run_as(process, gather):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    return processes.share_work(make, list(range(items)))
  parts = []
  if count > 1:
    for process in range(count):
      with pytest.raises(StopIteration):                         # keeps its share, stops at the gather
        run_as(process, lambda share: parts.append(share) or next(iter(())))
  everything = {k: np.stack([part[k] for part in parts]) for k in ("n", "twice")} if parts else {}
  for process in range(count):
    got = run_as(process, lambda _: everything)
    np.testing.assert_array_equal(got["n"], np.arange(items))
    np.testing.assert_array_equal(got["twice"], np.arange(items)[:, None].repeat(2, axis=1))
