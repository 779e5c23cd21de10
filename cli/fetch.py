"""`tandem fetch`: finds, imports or downloads a model and prints its directory."""

import sys
from collections.abc import Sequence

from cli.declarations import FETCH
from cli.resolve import resolve
from cli.stack_config import FetchConfig
from engine.weights.model_dir import resolve_model


def run(argv: Sequence[str]) -> int:
    """Prints the directory that serving would read; StartupError if there is none to be had."""
    config = resolve(FETCH, argv).config(FetchConfig)
    sys.stdout.write(f"{resolve_model(config.model)}\n")
    return 0
