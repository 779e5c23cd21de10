"""Answers of /v1/chat/completions."""

import secrets
from typing import Any

from services.router.dispatch.choice import Delta
from services.router.dispatch.generation import Generation, Output
from services.router.openai.answers import (
    AnswerHead,
    AnswerOptions,
    ChunkWriter,
    best_outputs,
    encode_json,
    usage_of,
)
from services.router.openai.chat_reader import ChatReader, Reading, ReadingRules
from services.router.openai.logprobs import TokenNames, chat_logprobs, named_prompt_logprobs
from services.router.openai.tool_parsers import ToolCallPiece

_ROLE_DELTA = b'{"role":"assistant","content":""}'


class ChatAnswers:
    """One request's answer. An `AnswerFormat`."""

    def __init__(
        self,
        head: AnswerHead,
        options: AnswerOptions,
        names: TokenNames,
        reading: ReadingRules,
        *,
        echoed: str = "",
    ) -> None:
        """Every output's content begins with `echoed`."""
        self._head = head
        self._echoed = echoed
        self._reading = reading
        self._readers: dict[int, ChatReader] = {}
        self._options = options
        self._names = names
        self._writer = ChunkWriter(head, "chat.completion.chunk", options)
        self._opened: set[int] = set()

    async def whole(self, generation: Generation) -> bytes:
        choices = [self._choice(*answered) for answered in best_outputs(generation)]
        answer: dict[str, Any] = {
            "id": self._head.id,
            "object": "chat.completion",
            "created": self._head.created,
            "model": self._head.model,
            "choices": choices,
            "usage": usage_of(generation),
        }
        if self._options.return_token_ids:
            answer["prompt_token_ids"] = generation.spec.prompts[0].token_ids
        prompt_logprobs = generation.outputs[0].prompt_logprobs
        if prompt_logprobs is not None:
            token_ids = generation.spec.prompts[0].token_ids
            answer["prompt_logprobs"] = named_prompt_logprobs(
                self._names, token_ids, prompt_logprobs
            )
        return encode_json(answer)

    def chunk(self, output: Output, delta: Delta) -> bytes:
        opening = b""
        if output.index not in self._opened:
            self._opened.add(output.index)
            opening = self._event(output, _ROLE_DELTA, b"", self._prompt_fields(output))
            if self._echoed:
                content = b'{"content":%b}' % encode_json(self._echoed)
                opening += self._event(output, content, b"")
        if self._reading.is_plain:
            content = b'{"content":%b}' % encode_json(delta.text)
            return opening + self._event(output, content, self._extras(delta))
        return opening + self._read_chunk(output, delta)

    async def end(self, generation: Generation) -> bytes:
        return self._writer.end(generation)

    def _read_chunk(self, output: Output, delta: Delta) -> bytes:
        """An event for each part that is read out of the text; none if all is held back."""
        is_last = delta.finish_reason is not None
        reader = self._reader(output)
        reading = reader.read(delta.text, is_last=is_last)
        parts: list[dict[str, Any]] = []
        if reading.reasoning:
            parts.append(_thoughts(reading))
        if reading.content:
            parts.append({"content": reading.content})
        parts += [{"tool_calls": [_call_delta(piece)]} for piece in reading.calls]
        extras = self._extras(delta, self._finish_reason(delta, reader))
        if extras and not parts:
            parts.append({})
        events = [self._event(output, encode_json(part), b"") for part in parts[:-1]]
        events += [self._event(output, encode_json(part), extras) for part in parts[-1:]]
        return b"".join(events)

    def _reader(self, output: Output) -> ChatReader:
        reader = self._readers.get(output.index)
        if reader is None:
            reader = self._readers[output.index] = self._reading.reader()
        return reader

    def _finish_reason(self, delta: Delta, reader: ChatReader) -> str | None:
        if delta.finish_reason == "stop" and reader.has_calls and self._reading.says_tool_calls:
            return "tool_calls"
        return delta.finish_reason

    def _prompt_fields(self, output: Output) -> bytes:
        """What an output's first event says of the prompt."""
        if not self._options.return_token_ids:
            return b""
        return b',"prompt_token_ids":' + encode_json(output.generation.spec.prompts[0].token_ids)

    def _event(self, output: Output, delta: bytes, extras: bytes, fields: bytes = b"") -> bytes:
        choice = b'{"index":%d,"delta":%b%b}' % (
            output.index,
            delta,
            extras or b',"logprobs":null,"finish_reason":null',
        )
        return self._writer.choices(choice, output.generation, fields)

    def _extras(self, delta: Delta, finish_reason: str | None = None) -> bytes:
        """What most events don't have: logprobs, token ids, the end, whose reason may differ."""
        if delta.finish_reason is None and not (delta.logprobs or self._options.return_token_ids):
            return b""
        fields: dict[str, Any] = {
            "logprobs": self._logprobs(delta),
            "finish_reason": finish_reason or delta.finish_reason,
        }
        if delta.finish_reason is not None:
            fields["stop_reason"] = delta.stop_reason
        if self._options.return_token_ids:
            fields["token_ids"] = delta.token_ids
        return b"," + encode_json(fields)[1:-1]

    def _choice(self, index: int, output: Output, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
        finish_reason: str | None = delta.finish_reason
        if not self._reading.is_plain:
            reader = self._reader(output)
            message |= _message(reader.read(delta.text, is_last=True))
            finish_reason = self._finish_reason(delta, reader)
        if self._echoed:
            message["content"] = self._echoed + (message["content"] or "")
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(delta),
            "finish_reason": finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._options.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not (delta.logprobs and self._options.logprobs):
            return None
        return chat_logprobs(self._names, delta.token_ids, delta.logprobs)


def _message(reading: Reading) -> dict[str, Any]:
    """The fields of a message that come of reading its whole text."""
    fields: dict[str, Any] = {"content": reading.content}
    if reading.reasoning:
        fields |= _thoughts(reading)
    if reading.calls:
        fields["tool_calls"] = [_call(piece) for piece in reading.calls]
        fields["content"] = reading.content or None
    return fields


def _thoughts(reading: Reading) -> dict[str, Any]:
    """Under both names that vLLM has had for them."""
    return {"reasoning_content": reading.reasoning, "reasoning": reading.reasoning}


def _call(piece: ToolCallPiece) -> dict[str, Any]:
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _call_delta(piece: ToolCallPiece) -> dict[str, Any]:
    """The first piece of a call has its id and name; the others go on with the arguments."""
    if piece.name is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {"index": piece.index, **_call(piece)}
