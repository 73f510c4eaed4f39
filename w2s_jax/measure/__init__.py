"""Metrics, probes, scan, self-test. `run` is a Run; its type is Any here, because run.py imports this package."""
