"""What fits where, before paying."""
