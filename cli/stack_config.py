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
    encode_workers: int = setting(
        1,
        minimum=1,
        metavar="N",
        help="encode workers: a model that only embeds has these, and no others",
    )
    routers: int = setting(
        1, minimum=1, metavar="N", help="router processes, all behind the same port"
    )
    gpu_sharing: str = setting(
        "turns",
        choices=("turns", "mps"),
        help="how workers share one GPU: in turns of some milliseconds, or at once, through "
        "NVIDIA's MPS, which is started for it",
    )
    mps_prefill_percentage: int = setting(
        100,
        minimum=1,
        maximum=100,
        help="with --gpu-sharing mps: of the GPU's multiprocessors, how many a prefill worker may "
        "use; decode workers may use all",
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


@dataclass(frozen=True, slots=True)
class RunBatchConfig:
    """What `tandem run-batch` reads and writes, and who answers; vLLM's names."""

    input_file: str | None = setting(
        None, short="i", metavar="FILE", help="requests, one a line, in OpenAI's batch format"
    )
    output_file: str | None = setting(
        None,
        short="o",
        metavar="FILE",
        help="results, one a line as they come; what is in it already isn't asked again",
    )
    url: str | None = setting(
        None, metavar="URL", help="running server to ask, instead of a stack of its own"
    )
    max_concurrency: int = setting(64, minimum=1, help="requests at once at most")
