"""Loads any OpenAI-compatible server and reports what its users would see."""
