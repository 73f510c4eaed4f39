"""Adapters in a parameter tree, and which leaves train."""
