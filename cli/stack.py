"""What a local stack consists of: which processes, with which arguments and environment."""

import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cli.child import ChildSpec
from cli.declarations import DECODE, ENCODE, PREFILL, ROUTER
from cli.gpus import GpuPlace, find_gpus, place
from cli.mps import mps_share
from cli.options import VARIABLE_PREFIX, OptionValue
from cli.probes import redis_probe, router_probe, worker_probe
from cli.redis_server import redis_arguments
from cli.registered_workers import RegisteredWorkers
from cli.resolve import Command, Settings
from cli.stack_config import StackConfig
from cli.supervisor import Service
from cli.threads import openmp_environment, threads_per_worker, usable_cores
from engine.config import EngineConfig

# Routers end first, because they still need workers for what runs; Redis ends last.
_REDIS_TIER, _WORKER_TIER, _ROUTER_TIER = range(3)
# Longer than a service's own drain timeout, which should be what ends it.
_STOP_MARGIN_S = 5.0
_LABEL_WIDTH = 10
_WORKERS = {command.name: command for command in (PREFILL, DECODE, ENCODE)}


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a stack's shared parts are found."""

    redis_url: str
    http_host: str
    http_port: int


def redis_service(server: Path, socket_path: Path, url: str) -> Service:
    """The stack's own Redis."""
    argv = redis_arguments(server, socket_path)
    spec = ChildSpec("redis", argv, dict(os.environ), quiet=True)
    return Service(spec, "redis", _REDIS_TIER, redis_probe(url), _STOP_MARGIN_S)


def router_services(
    settings: Settings, endpoints: Endpoints, listeners: Sequence[socket.socket]
) -> Iterator[Service]:
    """One router for each socket."""
    drain_timeout_s = _number(settings.values["drain_timeout_s"])
    for index, listener in enumerate(listeners):
        fixed = {"fd": listener.fileno(), "redis_url": endpoints.redis_url}
        spec = _spec(settings, ROUTER, f"router-{index}", fixed, {}, (listener.fileno(),))
        probe = router_probe(endpoints.http_host, endpoints.http_port)
        yield Service(spec, "router", _ROUTER_TIER, probe, drain_timeout_s + _STOP_MARGIN_S)


def worker_places(settings: Settings, names: Sequence[str]) -> dict[str, GpuPlace]:
    """On which GPU each worker runs, asking the driver only if there is something to choose."""
    is_choosing = len(names) > 1 and settings.config(EngineConfig).device != "cpu"
    return place(names, find_gpus(os.environ) if is_choosing else [])


def worker_services(
    settings: Settings,
    endpoints: Endpoints,
    workers: RegisteredWorkers,
    worker_ids: Mapping[str, str],
    places: Mapping[str, GpuPlace],
    environ: Mapping[str, str],
) -> Iterator[Service]:
    """The workers; `worker_ids` and `places` give their process names' ids in Redis, see
    `worker_names`, and GPUs, `environ` the variables of those that share one at once."""
    engine = settings.config(EngineConfig)
    num_workers = len(worker_ids)
    cores = usable_cores()
    num_threads = engine.num_threads or threads_per_worker(cores, num_workers)
    threads_environ = openmp_environment(
        num_threads=num_threads,
        is_crowded=num_threads * num_workers > cores,
        environ=os.environ,
    )
    gpu_share = engine.gpu_memory_utilization
    # The setting is for one worker, so a share that the operator has named stays as it is.
    divides_gpus = "gpu_memory_utilization" not in settings.explicit
    for name, worker_id in worker_ids.items():
        command = _WORKERS[name.partition("-")[0]]
        where = places[name]
        fixed = {
            "worker_id": worker_id,
            "redis_url": endpoints.redis_url,
            "num_threads": num_threads,
            "gpu_memory_utilization": where.memory_share(gpu_share) if divides_gpus else gpu_share,
        }
        own_environ = threads_environ | where.environ
        if environ and where.num_workers > 1:
            own_environ |= environ
            if command is PREFILL:
                own_environ |= mps_share(settings.config(StackConfig).mps_prefill_percentage)
        spec = _spec(settings, command, name, fixed, own_environ)
        probe = worker_probe(workers, worker_id)
        drain_timeout_s = _number(settings.values["drain_timeout_s"])
        yield Service(spec, command.name, _WORKER_TIER, probe, drain_timeout_s + _STOP_MARGIN_S)


def worker_names(config: StackConfig, *, only_embeds: bool) -> list[str]:
    """Process names of the workers of a stack whose model generates, or `only_embeds`."""
    if only_embeds:
        return [f"encode-{index}" for index in range(config.encode_workers)]
    return [f"prefill-{index}" for index in range(config.prefill_workers)] + [
        f"decode-{index}" for index in range(config.decode_workers)
    ]


def _spec(
    settings: Settings,
    command: Command,
    name: str,
    fixed: Mapping[str, OptionValue],
    environ: Mapping[str, str],
    pass_fds: tuple[int, ...] = (),
) -> ChildSpec:
    """The command line of one service, with what `settings` and `fixed` say about it."""
    arguments: list[str] = []
    secrets: dict[str, str] = {}
    for option in (option for group in command.groups for option in group.options()):
        value = fixed.get(option.name, _setting_for(command, settings, option.name, option.default))
        if value == option.default:
            continue
        if option.info.secret:
            # Anyone on the machine can read an argument list.
            secrets[option.variable] = option.variable_value(value)
        else:
            arguments += option.arguments(value)
    label = f"{name:<{_LABEL_WIDTH}}| " if settings.values["log_format"] == "text" else ""
    argv = (sys.executable, "-P", "-m", "cli", command.name, *arguments)
    return ChildSpec(name, argv, _child_environ() | dict(environ) | secrets, label, pass_fds)


def _setting_for(
    command: Command, settings: Settings, name: str, default: OptionValue
) -> OptionValue:
    # `--host` of a stack is where its routers listen; workers of one machine meet on loopback.
    if command is not ROUTER and name == "host":
        return default
    return settings.values.get(name, default)


def _child_environ() -> dict[str, str]:
    """Ours without settings, which the arguments say completely, and able to import us."""
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(VARIABLE_PREFIX)
    }
    root = str(Path(__file__).resolve().parent.parent)
    environ["PYTHONPATH"] = os.pathsep.join(_non_empty((root, environ.get("PYTHONPATH"))))
    environ["PYTHONUNBUFFERED"] = "1"
    return environ


def _non_empty(parts: Iterable[str | None]) -> list[str]:
    return [part for part in parts if part]


def _number(value: OptionValue) -> float:
    assert isinstance(value, float)
    return value
