"""Settings of a router process, frozen after start."""

from dataclasses import dataclass
from typing import Literal

from engine.grammar import BACKEND_NAMES
from protocol.settings import setting
from services.router.openai.reasoning_parsers import REASONING_FORMATS
from services.router.openai.tool_formats import TOOL_FORMATS


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Where the HTTP API listens, what it calls the model, whom it lets in and what it logs."""

    host: str = setting("127.0.0.1", help="address that the HTTP API binds")
    port: int = setting(8000, minimum=0, maximum=65535, help="port of the HTTP API; 0 takes any")
    fd: int | None = setting(
        None,
        minimum=0,
        help="number of an inherited, bound socket to serve on instead of host and port",
    )
    redis_url: str | None = setting(
        None,
        metavar="URL",
        help="Redis of the stack, redis://host:port/db or unix:///path; "
        "'tandem serve' starts one of its own without it",
    )
    model: str | None = setting(
        None,
        help="local HF directory, hub id, or nothing for the built-in SmolLM2-135M-Instruct",
    )
    served_model_name: tuple[str, ...] = setting(
        (), metavar="NAME", help="names of the model in the API; default: what MODEL is called"
    )
    api_key: tuple[str, ...] = setting(
        (), metavar="KEY", secret=True, help="keys of which clients must send one as bearer token"
    )
    api_key_file: str | None = setting(
        None, metavar="FILE", help="file with such keys, one a line; nobody sees them in a listing"
    )
    allowed_origins: tuple[str, ...] = setting(
        ("*",), metavar="ORIGIN", help="web sites whose pages may use the API from a browser"
    )
    chat_template: str | None = setting(
        None, metavar="FILE", help="Jinja file to use instead of the model's own chat template"
    )
    trust_request_chat_template: bool = setting(
        False,
        help="render a request's own `chat_template`; it runs sandboxed, but can take as long as "
        "it likes",
    )
    guided_decoding_backend: str = setting(
        "auto",
        choices=BACKEND_NAMES,
        help="library that holds outputs to grammars, one for routers and workers; xgrammar and "
        "outlines are extras to install; auto and guidance: llguidance",
    )
    enable_auto_tool_choice: bool = setting(
        False, help="let the model decide whether to call a tool; needs --tool-call-parser"
    )
    tool_call_parser: str | None = setting(
        None, choices=tuple(TOOL_FORMATS), help="how the model writes tool calls"
    )
    reasoning_parser: str | None = setting(
        None,
        choices=tuple(REASONING_FORMATS),
        help="how the model marks its thoughts, which are answered as `reasoning_content`",
    )
    pooling_type: Literal["auto", "last", "mean", "cls"] = setting(
        "auto",
        choices=("auto", "last", "mean", "cls"),
        help="what /v1/embeddings makes a vector of: the last token's state, the mean of all or, "
        "of an encoder, the first's; auto: as the model's 1_Pooling/config.json says, else a "
        "decoder's last and an encoder's mean",
    )
    local_prefill: Literal["auto", "never", "always"] = setting(
        "auto",
        choices=("auto", "never", "always"),
        help="whether decode workers prefill prompts themselves: when that is cheaper, only "
        "without prefill workers, or always",
    )
    max_attempts: int = setting(
        4, minimum=1, help="tries at a request whose workers die or give it up"
    )
    max_queued_requests: int = setting(
        10_000, minimum=0, help="requests that may wait for workers; others get 429"
    )
    queue_timeout_s: float = setting(
        600.0, minimum=0.0, help="seconds that a request may wait for workers before it gets 429"
    )
    max_body_bytes: int = setting(
        32 * 2**20, minimum=1024, help="longest request body that is read"
    )
    request_timeout_s: float = setting(
        3600.0, minimum=0.1, help="seconds after which a request ends with an error"
    )
    max_file_bytes: int = setting(
        200 * 2**20, minimum=1024, help="longest file that /v1/files takes; it's kept in Redis"
    )
    file_ttl_s: int = setting(
        30 * 86_400, minimum=60, help="seconds that files, and batches behind their time, are kept"
    )
    batch_concurrency: int = setting(
        32, minimum=1, help="requests of batches that a router sends to workers at once at most"
    )
    batch_priority: int = setting(
        100, minimum=0, help="least priority number of batches' requests; clients' are 0 by default"
    )
    response_ttl_s: float = setting(
        86_400.0,
        minimum=0.0,
        help="seconds for which answers of /v1/responses are kept, to go on from; 0 keeps none",
    )
    response_store_bytes: int = setting(
        256 * 2**20,
        minimum=0,
        help="bytes of such answers that Redis keeps at most; the oldest go first",
    )
    disable_log_requests: bool = setting(False, help="no line for each finished request")
    drain_timeout_s: float = setting(
        30.0, minimum=0.0, help="seconds that running requests get to end when the process stops"
    )
    log_format: str = setting(
        "text", choices=("text", "json"), help="log lines for people or for machines"
    )
    log_level: str = setting(
        "info", choices=("debug", "info", "warning", "error"), help="least severity that is logged"
    )
