"""Chooses each sequence's next token from its logits, all rows of a step at once."""
