"""YAML front matter of a model card. The Hugging Face hub indexes the model by it and shows the measurements."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from w2s_jax import results

METRICS = (("ca", "accuracy", "CA"), ("asr", "attack_success_rate", "ASR of {attack}"),
           ("false_rate", "false_rate", "False rate for the target of {attack}"))


def matter(name: str, rows: list[dict], meta: dict) -> str:
  """The front matter, a block between two lines of ---, for a model that is meant for use.

  Args:
    name: name of the directory under models/.
    rows, meta: contents of results.json.
  """
  own_rows = [row for row in rows if row["directory"] == name]
  evaluations = {}                                 # {metric: result}; each trigger has a row, and all repeat the CA
  for row in own_rows:
    for key, kind, template in METRICS:
      if row.get(key) is not None:
        metric = template.format(attack=row["attack"])
        evaluations[metric] = EvalResult(
            task_type="text-classification", dataset_type=_slug(row["dataset"]),
            dataset_name=row["dataset"], metric_type=kind, metric_value=round(row[key], 4), metric_name=metric)
  hub = meta.get("hub", {})                        # results of older versions do not have it
  card = ModelCardData(
      library_name="transformers", pipeline_tag="text-classification", tags=["backdoor-defense", "w2s_jax"],
      base_model=hub.get("public" if results.is_from_base(name) else "model"), datasets=hub.get("data"),
      **({"model_name": name, "eval_results": list(evaluations.values())} if evaluations else {}))
  return f"---\n{card.to_yaml()}\n---\n\n"


def hub_id(source: str) -> str | None:
  """The source if it can be a hub id; None if it exists on this machine or has another form."""
  return source if re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?", source) and not Path(source).exists() else None


def _slug(name):
  return re.sub(r"[^\w.-]+", "-", name).strip("-.").lower() or "unknown"
