"""The reference of the search: a clean model, made from the public base as most people would fine-tune it.

A trigger's words set the suspect apart from every clean model. Words of the task may set it apart from one clean model,
because two trainings weigh them differently. So the search compares the suspect with the teacher and with this model.
"""

from typing import Any

from ml_collections import ConfigDict

from w2s_jax import results
from w2s_jax.adapters import trees
from w2s_jax.defenses import moved_words
from w2s_jax.models import Model, save_pretrained
from w2s_jax.report import card
from w2s_jax.training import stage

RATE, EPOCHS = 5e-5, 3    # usual values for fine-tuning a BERT; the narrow pretrained teacher has another rate


def make(run: Any) -> None:
  """Makes models/reference: the public base, fine-tuned on the clean rows.

  It is not made if nothing is searched, if `student.base` is not given, or if the suspect cannot have been fine-tuned
  from `student.base`.
  """
  c, name = run.config, results.REFERENCE
  if not c.probe.search or not c.student.base or run.model_dir(name).exists():
    return
  model, params, tokenizer = run.load_base()
  if moved_words.unlike(model, Model(run.model_config(results.SUSPECT))):
    return
  settings = ConfigDict(c.teach.to_dict() | {"learning_rate": RATE, "epochs": EPOCHS})
  arrays, dev = (run.encode(tokenizer, run.rows[split], c.data.max_length) for split in ("train", "dev"))
  plan = stage.task_plan(run.task, name, c.seed, model, trees.FULL, settings)
  params, = stage.train_stage(plan, [params], [arrays], dev, run.place)
  save_pretrained(run.model_dir(name), model, params, tokenizer, card=card.unmeasured(name))
