"""Answers of /v1/responses: an answer is an object with items, a stream tells how it grows."""

import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec

from protocol.errors import TandemError
from services.router.dispatch.choice import Delta
from services.router.dispatch.generation import Generation, Output
from services.router.http.errors import HttpError, error_reply
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
from services.router.openai.logprobs import TokenNames, chat_logprobs
from services.router.responses.bodies import (
    InputItem,
    ReasoningOptions,
    ResponsesBody,
    TextFormat,
    TextOptions,
)
from services.router.responses.input import FIELD_NAMES
from services.router.responses.store import StoredResponse

Status: TypeAlias = Literal[
    "queued", "in_progress", "completed", "incomplete", "failed", "cancelled"
]
Keep: TypeAlias = Callable[[str, StoredResponse], Awaitable[bool]]
CountTokens: TypeAlias = Callable[[str], Awaitable[int]]

_STATUS: dict[str | None, Status] = {"stop": "completed", "length": "incomplete"}


@dataclass(frozen=True, slots=True)
class Question:
    """What is answered. `items` are all before the answer, the body's input included."""

    body: ResponsesBody
    items: list[InputItem]
    head: AnswerHead


class ResponsesAnswers:
    """One request's answer. An `AnswerFormat`.

    As in a chat, log probabilities are of all tokens of the output; the words' item has them.
    """

    def __init__(
        self,
        question: Question,
        names: TokenNames,
        reading: ReadingRules,
        *,
        keep: Keep | None,
        count_tokens: CountTokens,
    ) -> None:
        """Without `keep` the answer isn't kept."""
        self._body = question.body
        self._items = question.items
        self._head = question.head
        self._keep = keep
        self._count_tokens = count_tokens
        self._names = names
        self._reader = PartReader(reading)
        self._logprobs: list[dict[str, Any]] = []
        self._num_sent_logprobs = 0
        self._num_events = 0
        self._finish_reason: str | None = None

    async def whole(self, generation: Generation) -> bytes:
        self._read(generation.outputs[0].choice.take())
        return encode_json(await self._finished(generation))

    def chunk(self, output: Output, delta: Delta) -> bytes:
        opening = b"" if self._num_events else self._opening(output.generation)
        return opening + b"".join(self._events(self._read(delta)))

    async def end(self, generation: Generation) -> bytes:
        if generation.aborted:
            return b""
        opening = b"" if self._num_events else self._opening(generation)
        if generation.error is not None:
            answer = self._answer(generation, "failed") | {"error": failure(generation.error)}
        else:
            answer = await self._finished(generation)
        return opening + self._event(f"response.{answer['status']}", {"response": answer})

    def _read(self, delta: Delta) -> list[PartEvent]:
        self._finish_reason = delta.finish_reason or self._finish_reason
        if delta.logprobs:
            found = chat_logprobs(self._names, delta.token_ids, delta.logprobs)
            self._logprobs += found["content"]
        return self._reader.read(delta)

    # The stream's events:

    def _opening(self, generation: Generation) -> bytes:
        response = {"response": self._answer(generation, "in_progress")}
        created = self._event("response.created", response)
        return created + self._event("response.in_progress", response)

    def _events(self, events: list[PartEvent]) -> Iterator[bytes]:
        for event in events:
            match event:
                case Opened(part):
                    item = _item(part, "in_progress", [])
                    yield self._event("response.output_item.added", _place(part) | {"item": item})
                    if part.kind != "call":
                        content = {"part": _content(part, "", [])}
                        yield self._event(
                            "response.content_part.added", _text_place(part) | content
                        )
                case Grew(part, text):
                    yield self._grew(part, text)
                case Closed(part):
                    yield from self._closed(part)

    def _grew(self, part: Part, text: str) -> bytes:
        fields = _text_place(part) | {"delta": text}
        if part.kind == "words":
            fields["logprobs"] = self._logprobs[self._num_sent_logprobs :]
            self._num_sent_logprobs = len(self._logprobs)
        return self._event(f"response.{_TEXT_NAMES[part.kind]}.delta", fields)

    def _closed(self, part: Part) -> Iterator[bytes]:
        done = f"response.{_TEXT_NAMES[part.kind]}.done"
        if part.kind == "call":
            call = {"name": part.name, "arguments": part.text}
            yield self._event(done, _text_place(part) | call)
        else:
            content = _content(part, part.text, self._logprobs_of(part))
            text = {name: content[name] for name in ("text", "logprobs") if name in content}
            yield self._event(done, _text_place(part) | text)
            yield self._event("response.content_part.done", _text_place(part) | {"part": content})
        yield self._event(
            "response.output_item.done", _place(part) | {"item": self._finished_item(part)}
        )

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        head = {"type": kind, "sequence_number": self._num_events}
        self._num_events += 1
        return named_event(kind, encode_json(head | fields))

    # The answer itself:

    async def _finished(self, generation: Generation) -> dict[str, Any]:
        answer = self._answer(generation, _STATUS.get(self._finish_reason, "incomplete"))
        if self._finish_reason == "length":
            answer["incomplete_details"] = {"reason": "max_output_tokens"}
        answer["completed_at"] = int(time.time())
        answer["usage"] = await self._usage(generation)
        if self._keep is not None:
            # The answer is worth more than the chance to go on from it; it says so itself.
            try:
                answer["store"] = await self._keep(self._head.id, self._record(answer))
            except HttpError:
                answer["store"] = False
        return answer

    def unfinished(self, generation: Generation) -> StoredResponse:
        """What is kept of it until it's over."""
        return self._record(self._answer(generation, "queued"))

    def _record(self, answer: dict[str, Any]) -> StoredResponse:
        return StoredResponse(msgspec.Raw(encode_json(answer)), self._items)

    def _answer(self, generation: Generation, status: Status) -> dict[str, Any]:
        body, sampling = self._body, generation.spec.sampling
        text, reasoning = body.text or TextOptions(), body.reasoning or ReasoningOptions()
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "completed_at": None,
            "status": status,
            "background": self._body.background is True,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": self._head.model,
            "output": [self._finished_item(part) for part in self._reader.parts],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": reasoning,
            "service_tier": "default",
            "store": self._keep is not None,
            "temperature": sampling.temperature,
            "text": {"format": text.format or TextFormat(type="text"), "verbosity": "medium"},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "user": body.user,
        }

    def _finished_item(self, part: Part) -> dict[str, Any]:
        status = "completed" if part.is_whole else "incomplete"
        return _item(part, status, [_content(part, part.text, self._logprobs_of(part))])

    def _logprobs_of(self, part: Part) -> list[dict[str, Any]]:
        first = next((other for other in self._reader.parts if other.kind == "words"), None)
        return self._logprobs if part is first else []

    async def _usage(self, generation: Generation) -> dict[str, Any]:
        num_input, num_output = generation.num_prompt_tokens, generation.num_output_tokens
        thoughts = "".join(part.text for part in self._reader.parts if part.kind == "thoughts")
        num_thought = await self._count_tokens(thoughts) if thoughts else 0
        return {
            "input_tokens": num_input,
            "input_tokens_details": {
                "cached_tokens": generation.num_cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": min(num_thought, num_output)},
            "total_tokens": num_input + num_output,
        }


_TEXT_NAMES: dict[PartKind, str] = {
    "thoughts": "reasoning_text",
    "words": "output_text",
    "call": "function_call_arguments",
}
_ID_PREFIXES: dict[PartKind, str] = {"thoughts": "rs_", "words": "msg_", "call": "fc_"}


def _id(part: Part) -> str:
    return _ID_PREFIXES[part.kind] + part.id


def _place(part: Part) -> dict[str, Any]:
    return {"output_index": part.index}


def _text_place(part: Part) -> dict[str, Any]:
    """Of what an item's text events are about; all but calls have it in their only content."""
    place = {"item_id": _id(part), "output_index": part.index}
    return place if part.kind == "call" else place | {"content_index": 0}


def _item(part: Part, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    head = {"id": _id(part), "status": status}
    match part.kind:
        case "words":
            return head | {"type": "message", "role": "assistant", "content": content}
        case "thoughts":
            return head | {"type": "reasoning", "summary": [], "content": content}
        case "call":
            arguments = part.text if content else ""
            call = {"call_id": f"call_{part.id}", "name": part.name, "arguments": arguments}
            return head | {"type": "function_call"} | call


def _content(part: Part, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if part.kind == "thoughts":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def failure(error: TandemError) -> dict[str, Any]:
    """The codes that OpenAI's API has for a failed response."""
    reply = error_reply(renamed(error, FIELD_NAMES))
    code = "rate_limit_exceeded" if reply.status == 429 else "server_error"
    return {"code": code, "message": reply.detail.message}
