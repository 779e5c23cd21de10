"""Settings that every worker process has, whatever its role; frozen after start."""

from dataclasses import dataclass

from protocol.settings import setting


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """A worker's place in the stack: its name, its addresses and how it reaches the others."""

    worker_id: str | None = setting(
        None, help="this worker's name in Redis, logs and metrics; default: role, host and pid"
    )
    host: str = setting("127.0.0.1", help="address that this service binds and announces")
    control_port: int = setting(
        0, minimum=0, maximum=65535, help="ZMQ port for routers and peers; 0 takes a free one"
    )
    metrics_port: int = setting(
        0, minimum=0, maximum=65535, help="HTTP port of /metrics and /health; 0 takes a free one"
    )
    redis_url: str | None = setting(
        None,
        metavar="URL",
        help="Redis of the stack, redis://host:port/db or unix:///path; "
        "'tandem serve' starts one of its own without it",
    )
    ticket_ttl_s: float = setting(
        10.0,
        minimum=0.1,
        help="seconds that a decode worker keeps reserved blocks for a silent prefill worker",
    )
    verify_kv_checksums: bool = setting(
        False, help="check every transferred block's checksum, to find faulty transports"
    )
    drain_timeout_s: float = setting(
        30.0, minimum=0.0, help="seconds that running requests get to end when the worker stops"
    )
    log_format: str = setting(
        "text", choices=("text", "json"), help="log lines for people or for machines"
    )
    log_level: str = setting(
        "info", choices=("debug", "info", "warning", "error"), help="least severity that is logged"
    )
