"""Loads a worker's engine, away from the threads that will serve."""

import sys
from concurrent.futures import ThreadPoolExecutor

from engine.config import EngineConfig
from engine.engine import Engine


def load_engine(config: EngineConfig) -> Engine:
    """`Engine.load` on a thread that ends with it. Raises StartupError.

    Each thread that computes has OpenMP threads of its own for as long as it lives. Were the
    loader's still there, OpenMP would count more of them than cores and put those of the engine
    thread to sleep between any two operations.
    """
    with ThreadPoolExecutor(1, "engine-loader") as executor:
        return executor.submit(Engine.load, config, progress=sys.stderr.isatty()).result()
