"""Means and paired differences of rates over seeds, as text."""

import math
import statistics
from collections.abc import Sequence


def mean(values: Sequence[float | None]) -> str:
  """The mean, with ± standard deviation if there are several values; "-" if none was measured."""
  values = [value for value in values if value is not None]
  if not values:
    return "-"
  return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def difference(pairs: Sequence[tuple[dict, dict]], rate: str) -> str:
  """Mean difference of the rate over pairs of rows, and its 95% interval, as text.

  Several pairs get Student's interval over seeds. A single pair gets Newcombe's interval (Statistics in Medicine 17,
  1998, method 10). It covers only the sampling of test rows, and treats the two samples as independent. A single pair
  gets no interval if a row has none, because its rates are means over the seeds of one run (compare.groups).

  Args:
    pairs: (row, row to subtract), dicts of results.json.
    rate: "ca" or "asr".
  """
  pairs = [(own, other) for own, other in pairs if own[rate] is not None and other[rate] is not None]
  if not pairs:
    return "-"
  gaps = [own[rate] - other[rate] for own, other in pairs]
  middle = statistics.mean(gaps)
  if len(pairs) > 1:
    import scipy.stats  # late: the import takes half a second
    half = scipy.stats.t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    low, high = middle - half, middle + half
  elif None in (pairs[0][0][f"{rate}_ci"], pairs[0][1][f"{rate}_ci"]):
    return f"{middle:+.3f}"
  else:
    (own, other), = pairs
    (p, (p_low, p_high)), (q, (q_low, q_high)) = ((row[rate], row[f"{rate}_ci"]) for row in (own, other))
    low, high = middle - math.hypot(p - p_low, q_high - q), middle + math.hypot(p_high - p, q - q_low)
  return f"{middle:+.3f} ({low:+.3f} to {high:+.3f})"
