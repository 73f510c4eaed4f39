"""Tasks: one file per task; `TASKS` maps names to records. B rows of a batch, N rows, C classes.

A task defines what a row, a loss, a correct answer and a hit of the attacker's target are.
"""

from w2s_jax.tasks.classification import CLASSIFICATION
from w2s_jax.tasks.task import Task

TASKS = {"classification": CLASSIFICATION}

__all__ = ["CLASSIFICATION", "TASKS", "Task"]
