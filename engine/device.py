"""Where a model runs."""

import torch

from protocol.errors import StartupError


def resolve_device(name: str) -> torch.device:
    """`--device`'s value, with "auto" decided. Raises StartupError if it isn't here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: torch finds no CUDA device here.")
    return torch.device(name)
