"""Layers that several architectures share; each takes its weights when it's constructed."""
