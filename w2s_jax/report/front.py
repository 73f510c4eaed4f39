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
            task_type="text-classification", dataset_type=_slug(row["dataset"]),
            dataset_name=row["dataset"], metric_type=kind, metric_value=round(row[key], 4), metric_name=metric)
  hub = meta.get("hub", {})                        # not in results of older versions
  card = ModelCardData(
      library_name="transformers", pipeline_tag="text-classification", tags=["backdoor-defense", "w2s_jax"],
      base_model=hub.get("model"), datasets=hub.get("data"),
      **({"model_name": name, "eval_results": list(found.values())} if found else {}))
  return f"---\n{card.to_yaml()}\n---\n\n"


def hub_id(source: str) -> str | None:
  """The source, None where it is a place on this machine or nothing that the hub could have."""
  return source if re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?", source) and not Path(source).exists() else None


def _slug(name):
  return re.sub(r"[^\w.-]+", "-", name).strip("-.").lower() or "unknown"
