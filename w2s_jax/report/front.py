"""YAML front matter of a model card, by which the Hugging Face hub finds a model and shows what was measured."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

METRICS = (("ca", "accuracy", "CA"), ("asr", "attack_success_rate", "ASR of {attack}"),
           ("false_rate", "false_rate", "False rate beside {attack}"))


def matter(name: str, rows: list[dict], meta: dict) -> str:
  """The block between two lines of ---, of a model that is meant to be used.

  Args:
    name: of the directory under models/.
    rows, meta: of results.json.
  """
  mine = [row for row in rows if row["directory"] == name]
  found = {}                                       # the CA stands in the row of every trigger
  for row in mine:
    for key, kind, called in METRICS:
      if row.get(key) is not None:
        metric = called.format(attack=row["attack"])
        found[metric] = EvalResult(
            task_type="text-classification", dataset_type=re.sub(r"[^\w.-]+", "-", row["dataset"]).strip("-.").lower(),
            dataset_name=row["dataset"], metric_type=kind, metric_value=round(row[key], 4), metric_name=metric)
  base, data = meta["base"]["public"] or meta["base"]["path"], mine[0]["dataset"] if mine else ""
  card = ModelCardData(
      library_name="transformers", pipeline_tag="text-classification", tags=["backdoor-defense", "w2s_jax"],
      base_model=_hub_id(base), datasets=_hub_id(data),
      **({"model_name": name, "eval_results": list(found.values())} if found else {}))
  return f"---\n{card.to_yaml()}\n---\n\n"


def _hub_id(source):
  """None where it is a place on this machine, or nothing that the hub could have."""
  return source if re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?", source) and not Path(source).exists() else None
