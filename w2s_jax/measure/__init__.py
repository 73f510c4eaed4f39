"""Metrics, probes, scan, self-test. `run` is a Run of w2s_jax/run.py, typed Any: that layer is above this one."""
