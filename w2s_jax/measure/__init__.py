"""Metrics, probes, scan."""
