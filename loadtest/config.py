"""Settings of `tandem bench`; vLLM's names for what its benchmark has."""

from dataclasses import dataclass

from protocol.settings import setting


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """Which server is loaded, with which requests, how fast, and where results go."""

    base_url: str = setting("http://127.0.0.1:8000", metavar="URL", help="server to load")
    api_key: str | None = setting(None, metavar="KEY", secret=True, help="bearer token to send")
    model: str | None = setting(None, help="model to ask for; default: the server's first")
    endpoint: str = setting("chat", choices=("chat", "completions"), help="API to call")
    num_prompts: int = setting(64, minimum=1, help="requests to send")
    max_concurrency: int | None = setting(
        None, minimum=1, help="requests at once at most; default: 8, or no limit with a rate"
    )
    request_rate: float | None = setting(
        None,
        minimum=0.001,
        help="mean requests per second, as a Poisson process; default: next when one has ended",
    )
    input_len: int = setting(512, minimum=1, help="tokens of text in each prompt")
    output_len: int = setting(64, minimum=1, help="tokens to generate")
    prefix_len: int = setting(0, minimum=0, help="tokens of the prompt that requests share")
    num_prefixes: int = setting(1, minimum=1, help="different shared prefixes")
    ignore_eos: bool = setting(True, help="always generate the full output length")
    temperature: float = setting(0.0, minimum=0.0, help="sampling temperature")
    stream: bool = setting(True, help="ask for a stream; without one there is no TTFT")
    tokenizer: str | None = setting(
        None,
        metavar="DIR",
        help="directory with the model's tokenizer.json; default: what the server names as root",
    )
    trace: str | None = setting(
        None, metavar="FILE", help="replay a Mooncake .jsonl or an Azure .csv trace"
    )
    trace_speed: float = setting(1.0, minimum=0.001, help="replay this many times as fast")
    trace_scale: float = setting(
        1.0, minimum=0.0001, maximum=1.0, help="scale the trace's token counts by this"
    )
    warmup_prompts: int = setting(1, minimum=0, help="requests before, which don't count")
    request_timeout_s: float = setting(600.0, minimum=0.1, help="seconds until one is given up")
    seed: int = setting(0, help="root of prompts and arrival times")
    result_file: str | None = setting(None, metavar="FILE", help="write the summary as JSON")
    requests_file: str | None = setting(
        None, metavar="FILE", help="write a line of JSON for each request"
    )
