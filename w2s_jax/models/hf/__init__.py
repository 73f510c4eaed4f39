"""Reads and writes Hugging Face model directories."""
