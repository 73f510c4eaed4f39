"""Tables, page, cards."""
