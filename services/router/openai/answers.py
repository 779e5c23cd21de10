"""What all answers of the API have in common: head, usage, and how a stream writes an event."""

from typing import Any, Protocol

import msgspec

from services.router.dispatch.choice import Delta
from services.router.dispatch.generation import Generation, Output
from services.router.http.errors import error_reply

encode_json = msgspec.json.Encoder().encode

STREAM_END = b"data: [DONE]\n\n"


class AnswerOptions(msgspec.Struct, frozen=True):
    """The parts of a body that shape its answer."""

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    echo: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False


class AnswerHead(msgspec.Struct, frozen=True):
    """`created` in Unix seconds."""

    id: str
    created: int
    model: str


class AnswerFormat(Protocol):
    """Writes one request's answer, whole or as a stream, in the form of one of the APIs."""

    async def whole(self, generation: Generation) -> bytes: ...

    def chunk(self, output: Output, delta: Delta) -> bytes:
        """The event or events of one output's news."""
        ...

    async def end(self, generation: Generation) -> bytes:
        """The events behind the last chunk, also where the generation failed."""
        ...


def best_outputs(generation: Generation) -> list[tuple[int, Output, Delta]]:
    """A finished generation's outputs to answer with, under the index that each gets.

    Of each prompt's outputs the best come first, by their tokens' mean log-probability, where
    fewer are returned than there are.
    """
    spec = generation.spec
    taken = [(output, output.choice.take()) for output in generation.outputs]
    n, num_returned = spec.sampling.n, spec.num_returned
    if num_returned is None or num_returned == n:
        return [(output.index, output, delta) for output, delta in taken]
    best: list[tuple[int, Output, Delta]] = []
    for start in range(0, len(taken), n):
        ranked = sorted(taken[start : start + n], key=lambda pair: -_mean_logprob(pair[1]))
        best += [
            (len(best) + rank, output, delta)
            for rank, (output, delta) in enumerate(ranked[:num_returned])
        ]
    return best


def _mean_logprob(delta: Delta) -> float:
    return sum(token.logprob for token in delta.logprobs) / max(1, len(delta.logprobs))


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    return b"event: %b\n" % name.encode() + event(data)


def usage_of(generation: Generation) -> dict[str, Any]:
    num_prompt_tokens = generation.num_prompt_tokens
    num_output_tokens = generation.num_output_tokens
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


class ChunkWriter:
    """Joins the fixed bytes of a stream's events with what changes, without building objects.

    An event costs one small JSON string to encode; the rest is the same bytes again and again.
    """

    def __init__(self, head: AnswerHead, kind: str, options: AnswerOptions) -> None:
        fields = {"id": head.id, "object": kind, "created": head.created, "model": head.model}
        self._opening = b"data: " + encode_json(fields)[:-1]
        self._options = options
        closing = b',"usage":null' if options.include_usage else b""
        self._closing = closing + b"}\n\n"

    def choices(self, choices: bytes, generation: Generation, fields: bytes = b"") -> bytes:
        """An event with these choices, a JSON array's inside, and further `fields`, if any."""
        if self._options.continuous_usage:
            usage = encode_json(usage_of(generation))
            return b'%b,"choices":[%b]%b,"usage":%b}\n\n' % (
                *(self._opening, choices, fields, usage),
            )
        return b'%b,"choices":[%b]%b%b' % (self._opening, choices, fields, self._closing)

    def end(self, generation: Generation) -> bytes:
        """An error, or the usage if the stream was asked for it; then the mark of its end."""
        if generation.error is not None:
            return event(error_reply(generation.error).body) + STREAM_END
        if generation.aborted or not self._options.include_usage:
            return STREAM_END
        usage = encode_json(usage_of(generation))
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._opening, usage) + STREAM_END
