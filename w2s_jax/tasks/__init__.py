"""What a row, a hit and a loss are: one file per task; a dict names them. B rows of a batch, N rows, C classes."""

from w2s_jax.tasks.classification import CLASSIFICATION
from w2s_jax.tasks.task import Task

TASKS = {"classification": CLASSIFICATION}

__all__ = ["CLASSIFICATION", "TASKS", "Task"]
