"""Metrics, probes, scan. `run` is the Run of w2s_jax/run.py, which lies above: its type is Any here."""
