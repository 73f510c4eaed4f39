"""What several processes share, as each of them sees it; real ones are in test_launch.py."""

import jax
import numpy as np
import pytest

from w2s_jax import processes


@pytest.mark.parametrize("count,items", [(1, 3), (2, 1), (2, 5), (3, 6), (5, 2)])
def test_a_share_each_makes_the_whole(count, items, monkeypatch):
  """Every item in order, also where a process has none of its own; each makes at most its part."""
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
      with pytest.raises(StopIteration):                         # what it contributes, before the others do
        run_as(process, lambda mine: parts.append(mine) or next(iter(())))
  everything = {k: np.stack([part[k] for part in parts]) for k in ("n", "twice")} if parts else {}
  for process in range(count):
    got = run_as(process, lambda _: everything)
    np.testing.assert_array_equal(got["n"], np.arange(items))
    np.testing.assert_array_equal(got["twice"], np.arange(items)[:, None].repeat(2, axis=1))
