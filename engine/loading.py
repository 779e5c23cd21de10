"""Loads a worker's engine, away from the threads that will serve."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from engine.engine import Engine

EngineT = TypeVar("EngineT")


def load_engine(config: EngineConfig) -> Engine:
    """`Engine.load` on a thread that ends with it. Raises StartupError."""
    return _on_own_thread(lambda: Engine.load(config, progress=sys.stderr.isatty()))


def load_encoder_engine(config: EngineConfig) -> EncoderEngine:
    """As `load_engine`, for a model that only embeds."""
    return _on_own_thread(lambda: EncoderEngine.load(config, progress=sys.stderr.isatty()))


def _on_own_thread(load: Callable[[], EngineT]) -> EngineT:
    """What `load` returns or raises.

    Each thread that computes has OpenMP threads of its own for as long as it lives. Were the
    loader's still there, OpenMP would count more of them than cores and put those of the engine
    thread to sleep between any two operations.
    """
    with ThreadPoolExecutor(1, "engine-loader") as executor:
        return executor.submit(load).result()
