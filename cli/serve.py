"""`tandem serve`: a whole stack on this machine, from one command.

1. Settings are resolved and the port is bound, so that mistakes show before anything starts.
2. The model's directory is found; a GGUF is imported, once, with a progress bar.
3. Redis (unless `--redis-url` names one), workers and routers start at the same time.
4. Workers are ready once registered in Redis, a router once its /health says so.
5. Until a signal: crashed processes are started again.
6. A signal stops routers, then workers, then Redis; a second one kills what is left.
"""

import asyncio
import os
import socket
from collections.abc import Sequence

from cli.announce import Announcer
from cli.declarations import SERVE
from cli.gpus import describe
from cli.listen import bind_listeners, bound_port, reachable_host
from cli.mps import start_mps
from cli.redis_server import answers, find_redis_server, redis_socket_url
from cli.registered_workers import RegisteredWorkers
from cli.resolve import Settings, resolve
from cli.running_stack import RunningStack, StackWork
from cli.runtime_dir import RuntimeDir, runtime_dir
from cli.stack import (
    Endpoints,
    redis_service,
    router_services,
    worker_names,
    worker_places,
    worker_services,
)
from cli.stack_config import StackConfig
from cli.supervisor import Service
from engine.config import EngineConfig
from engine.models.encoder_config import is_encoder
from engine.weights.model_dir import model_name, resolve_model
from protocol.errors import StartupError
from services.router.config import RouterConfig
from services.runtime.redis_client import open_redis


def run(argv: Sequence[str]) -> int:
    """Serves until SIGINT or SIGTERM; StartupError if something can't start."""
    settings = resolve(SERVE, argv)
    run_stack(settings, settings.config(RouterConfig, fd=None))
    return 0


def run_stack(settings: Settings, router: RouterConfig, *, work: StackWork | None = None) -> None:
    """Until a signal, or until `work` is done, which gets the URL of the ready stack.

    Raises StartupError, and what `work` raises.
    """
    listeners = bind_listeners(router.host, router.port, count=settings.config(StackConfig).routers)
    model_dir = resolve_model(settings.config(EngineConfig).model)
    names = worker_names(settings.config(StackConfig), only_embeds=is_encoder(model_dir))
    with runtime_dir() as directory:
        asyncio.run(_serve(settings, router, listeners, names, directory, work))


async def _serve(
    settings: Settings,
    router: RouterConfig,
    listeners: Sequence[socket.socket],
    names: Sequence[str],
    runtime: RuntimeDir,
    work: StackWork | None,
) -> None:
    redis_url = router.redis_url or redis_socket_url(runtime.redis_socket)
    endpoints = Endpoints(redis_url, reachable_host(router.host), bound_port(listeners[0]))
    services: list[Service] = []
    if router.redis_url is None:
        services.append(redis_service(find_redis_server(), runtime.redis_socket, redis_url))
    elif not await answers(router.redis_url):
        raise StartupError(f"There is no Redis at {router.redis_url}.")
    redis = open_redis(redis_url)
    workers = RegisteredWorkers(redis)
    worker_ids = {name: _worker_id(name, own_redis=router.redis_url is None) for name in names}
    announcer = Announcer(json_lines=router.log_format == "json")
    places = worker_places(settings, names)
    if (told := describe(places)) is not None:
        announcer.say("placed", told)
    shares_at_once = settings.config(StackConfig).gpu_sharing == "mps" and any(
        one.num_workers > 1 for one in places.values()
    )
    environ = start_mps(runtime.mps) if shares_at_once else {}
    services += worker_services(settings, endpoints, workers, worker_ids, places, environ)
    services += router_services(settings, endpoints, listeners)
    model = router.served_model_name or (model_name(router.model),)
    stack = RunningStack(
        services,
        model=model[0],
        endpoints=endpoints,
        workers=workers,
        worker_ids=worker_ids,
        runtime=runtime,
        announcer=announcer,
    )
    try:
        start_timeout_s = settings.config(StackConfig).start_timeout_s
        await stack.run(start_timeout_s=start_timeout_s, work=work)
    finally:
        await redis.aclose()


def _worker_id(name: str, *, own_redis: bool) -> str:
    # Stacks that share a Redis must not take each other's names.
    return name if own_redis else f"{name}-{socket.gethostname()}-{os.getpid()}"
