"""Settings of the commands that aren't one service."""

from dataclasses import dataclass

from protocol.settings import setting


@dataclass(frozen=True, slots=True)
class StackConfig:
    """How many processes `tandem serve` starts and how long it waits for them."""

    prefill_workers: int = setting(
        1, minimum=0, metavar="N", help="prefill workers; with 0 decode workers do everything"
    )
    decode_workers: int = setting(1, minimum=1, metavar="N", help="decode workers")
    routers: int = setting(
        1, minimum=1, metavar="N", help="router processes, all behind the same port"
    )
    start_timeout_s: float = setting(
        600.0, minimum=1.0, help="seconds within which every process must be ready"
    )


@dataclass(frozen=True, slots=True)
class FetchConfig:
    """What `tandem fetch` takes."""

    model: str | None = setting(
        None,
        help="local HF directory, hub id, or nothing for the built-in SmolLM2-135M-Instruct",
    )
