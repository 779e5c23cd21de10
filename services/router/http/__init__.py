"""The HTTP surface: routes, errors, limits, streams."""
