"""Filters of every kind, and together, for the tests of those that apply them."""

# (top_k, top_p, min_p) of each row.
ROWS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (3, 1.0, 0.0),
    (40, 0.9, 0.0),
    (300, 0.5, 0.0),
    (10**9, 0.99, 0.0),
    (0, 0.05, 0.0),
    (0, 0.9, 0.0),
    (0, 0.9999, 0.0),
    (0, 1.0, 0.2),
    (0, 0.8, 0.01),
    (50, 0.95, 0.1),
    (0, 1.0, 1.0),
]
