"""`tandem router`, `prefill`, `decode` and `encode`: one service in this process."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cli.declarations import DECODE, ENCODE, PREFILL, ROUTER
from cli.resolve import Settings, resolve
from cli.threads import openmp_environment, usable_cores
from engine.config import EngineConfig
from protocol.errors import StartupError
from services.router.config import RouterConfig
from services.runtime.config import WorkerConfig


def run_router(argv: Sequence[str]) -> int:
    """Serves the HTTP API until the process is told to stop."""
    config = resolve(ROUTER, argv).config(RouterConfig)
    _require_redis(config.redis_url)
    with _importing():
        from services.router.service import run_router as serve

    return serve(config)


def run_prefill(argv: Sequence[str]) -> int:
    """Runs a prefill worker until the process is told to stop."""
    engine, worker = _worker_configs(resolve(PREFILL, argv))
    # Below normal: where NVIDIA's MPS shares a card, prompts leave it to running streams first.
    os.environ.setdefault("CUDA_MPS_CLIENT_PRIORITY", "1")
    with _importing():
        from services.prefill.service import run_prefill as serve

    return serve(engine, worker)


def run_decode(argv: Sequence[str]) -> int:
    """Runs a decode worker until the process is told to stop."""
    engine, worker = _worker_configs(resolve(DECODE, argv))
    with _importing():
        from services.decode.service import run_decode as serve

    return serve(engine, worker)


def run_encode(argv: Sequence[str]) -> int:
    """Runs an encode worker until the process is told to stop."""
    engine, worker = _worker_configs(resolve(ENCODE, argv))
    with _importing():
        from services.encode.service import run_encode as serve

    return serve(engine, worker)


@contextmanager
def _importing() -> Iterator[None]:
    # torch comes in 200,000 objects, which the collector would walk again and again: 0.2 s.
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _worker_configs(settings: Settings) -> tuple[EngineConfig, WorkerConfig]:
    engine, worker = settings.config(EngineConfig), settings.config(WorkerConfig)
    _require_redis(worker.redis_url)
    # libgomp reads its environment once, when torch is imported, so this comes before that.
    num_threads = engine.num_threads or usable_cores()
    os.environ.update(
        openmp_environment(num_threads=num_threads, is_crowded=False, environ=os.environ)
    )
    return engine, worker


def _require_redis(url: str | None) -> None:
    if url is None:
        raise StartupError("Name the stack's Redis with --redis-url or TANDEM_REDIS_URL.")
