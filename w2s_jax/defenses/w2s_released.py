"""The released code's arithmetic: its feature loss does not pair examples (README, "Differences")."""

from w2s_jax import losses
from w2s_jax.defenses import w2s


def terms(student, batch, settings, task):
  released = losses.released_feature_alignment(student.hidden, batch["teacher_features"], batch["weight"])
  return w2s.terms(student, batch, settings, task) | {"fa": released}


RECIPE = w2s.RECIPE._replace(terms=terms, layout="padded")
