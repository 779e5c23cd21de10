"""OpenAI's request bodies and answers, as far as a load test looks at them."""

import msgspec

from loadtest.config import BenchConfig
from loadtest.workload import PlannedRequest
from protocol.decoding import decode

PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts as the server states them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Message | None = None
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None


class Answer(msgspec.Struct):
    """A whole answer, or one event of a stream."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: object = None

    @property
    def text(self) -> str:
        if not self.choices:
            return ""
        choice = self.choices[0]
        message = choice.delta or choice.message
        return (message.content if message is not None else choice.text) or ""

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason if self.choices else None


_DECODER = msgspec.json.Decoder(Answer)


def decode_answer(data: bytes) -> Answer:
    """Raises UnreadableError if `data` is nothing of OpenAI's."""
    return decode(_DECODER, data)


def request_body(config: BenchConfig, model: str, request: PlannedRequest) -> bytes:
    """The JSON body that asks for `request`."""
    body: dict[str, object] = {
        "model": model,
        "max_tokens": request.output_len,
        "temperature": config.temperature,
        "stream": config.stream,
    }
    if config.ignore_eos:
        body["ignore_eos"] = True
    if config.stream:
        body["stream_options"] = {"include_usage": True}
    if config.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        body["prompt"] = request.prompt
    return msgspec.json.encode(body)


class EventSplitter:
    """Cuts a server-sent event stream into the data of its events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that `chunk` completes."""
        *events, self._rest = (self._rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
        return [event[5:].strip() for event in events if event.startswith(b"data:")]
