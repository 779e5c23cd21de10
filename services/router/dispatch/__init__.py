"""Requests under way: admitted, sent to workers, tried again, delivered."""
