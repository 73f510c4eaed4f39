"""Corpora, tokenization, poisoned rows, batches."""
