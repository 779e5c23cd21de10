"""Answers of /v1/messages: a message with content of several kinds, whole or growing."""

import json
from collections.abc import Iterator
from typing import Any, cast

from services.router.dispatch.choice import Delta
from services.router.dispatch.generation import Generation, Output
from services.router.http.errors import error_reply
from services.router.messages.input import FIELD_NAMES
from services.router.openai.answer_parts import (
    Closed,
    Grew,
    Opened,
    Part,
    PartEvent,
    PartKind,
    PartReader,
)
from services.router.openai.answers import AnswerHead, encode_json, named_event
from services.router.openai.chat_fields import renamed
from services.router.openai.chat_reader import ReadingRules


class MessagesAnswers:
    """One request's answer. An `AnswerFormat`."""

    def __init__(self, head: AnswerHead, reading: ReadingRules) -> None:
        self._head = head
        self._reader = PartReader(reading)
        self._is_begun = False
        self._last = Delta()

    async def whole(self, generation: Generation) -> bytes:
        self._read(generation.outputs[0].choice.take())
        content = [_content(part) for part in self._reader.parts]
        return encode_json(self._message(content, generation) | self._stop())

    def chunk(self, output: Output, delta: Delta) -> bytes:
        return self._opening(output.generation) + b"".join(self._events(self._read(delta)))

    async def end(self, generation: Generation) -> bytes:
        if generation.aborted:
            return b""
        if generation.error is not None:
            error = renamed(generation.error, FIELD_NAMES)
            return named_event("error", error_reply(error).messages_body)
        usage = _usage(generation)
        return (
            self._opening(generation)
            + _event("message_delta", {"delta": self._stop(), "usage": usage})
            + _event("message_stop", {})
        )

    def _read(self, delta: Delta) -> list[PartEvent]:
        self._last = delta
        return self._reader.read(delta)

    def _opening(self, generation: Generation) -> bytes:
        """Empty but for the first time."""
        if self._is_begun:
            return b""
        self._is_begun = True
        message = self._message([], generation) | {"stop_reason": None, "stop_sequence": None}
        return _event("message_start", {"message": message})

    def _events(self, events: list[PartEvent]) -> Iterator[bytes]:
        for event in events:
            match event:
                case Opened(part):
                    block = {"index": part.index, "content_block": _begun(part)}
                    yield _event("content_block_start", block)
                case Grew(part, text):
                    kind, name = _DELTAS[part.kind]
                    delta = {"type": kind, name: text}
                    yield _event("content_block_delta", {"index": part.index, "delta": delta})
                case Closed(part):
                    yield _event("content_block_stop", {"index": part.index})

    def _message(self, content: list[dict[str, Any]], generation: Generation) -> dict[str, Any]:
        return {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": content,
            "usage": _usage(generation),
        }

    def _stop(self) -> dict[str, Any]:
        """Why the output ended; as in a chat, calls come before what it ended with."""
        reason, sequence = "end_turn", None
        if self._last.finish_reason != "stop":
            reason = "max_tokens"
        elif self._reader.has_calls:
            reason = "tool_use"
        elif isinstance(self._last.stop_reason, str):
            reason, sequence = "stop_sequence", self._last.stop_reason
        return {"stop_reason": reason, "stop_sequence": sequence}


# A delta's type, and its field that has the text.
_DELTAS: dict[PartKind, tuple[str, str]] = {
    "thoughts": ("thinking_delta", "thinking"),
    "words": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return named_event(kind, encode_json({"type": kind} | fields))


def _begun(part: Part) -> dict[str, Any]:
    """A part's content before any of its text."""
    match part.kind:
        case "words":
            return {"type": "text", "text": ""}
        case "thoughts":
            # Thoughts that come back aren't checked, so nothing is signed.
            return {"type": "thinking", "thinking": "", "signature": ""}
        case "call":
            return {"type": "tool_use", "id": f"toolu_{part.id}", "name": part.name, "input": {}}


def _content(part: Part) -> dict[str, Any]:
    match part.kind:
        case "words":
            return _begun(part) | {"text": part.text}
        case "thoughts":
            return _begun(part) | {"thinking": part.text}
        case "call":
            return _begun(part) | {"input": _arguments(part)}


def _arguments(part: Part) -> dict[str, Any]:
    """Empty for a call that was cut off, which is no JSON."""
    try:
        arguments: Any = json.loads(part.text)
    except ValueError:
        return {}
    return cast("dict[str, Any]", arguments) if isinstance(arguments, dict) else {}


def _usage(generation: Generation) -> dict[str, Any]:
    """Here, what was found in the prefix cache doesn't count as input again."""
    num_cached = generation.num_cached_tokens
    return {
        "input_tokens": generation.num_prompt_tokens - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": generation.num_output_tokens,
    }
