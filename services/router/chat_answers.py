"""Answers of /v1/chat/completions."""

from typing import Any

from services.router.answers import (
    AnswerHead,
    AnswerOptions,
    ChunkWriter,
    encode_json,
    usage_of,
)
from services.router.choice import Delta
from services.router.generation import Generation, Output
from services.router.logprobs import TokenNames, chat_logprobs

_ROLE_DELTA = b'{"role":"assistant","content":""}'


class ChatAnswers:
    """One request's answer. An `AnswerFormat`."""

    def __init__(self, head: AnswerHead, options: AnswerOptions, names: TokenNames) -> None:
        self._head = head
        self._options = options
        self._names = names
        self._writer = ChunkWriter(head, "chat.completion.chunk", options)
        self._opened: set[int] = set()

    def whole(self, generation: Generation) -> bytes:
        choices = [self._choice(output, output.choice.take()) for output in generation.outputs]
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
        return encode_json(answer)

    def chunk(self, output: Output, delta: Delta) -> bytes:
        opening = b""
        if output.index not in self._opened:
            self._opened.add(output.index)
            opening = self._event(output, _ROLE_DELTA, b"")
        content = b'{"content":%b}' % encode_json(delta.text)
        return opening + self._event(output, content, self._extras(delta))

    def usage_chunk(self, generation: Generation) -> bytes:
        return self._writer.usage(generation)

    def _event(self, output: Output, delta: bytes, extras: bytes) -> bytes:
        choice = b'{"index":%d,"delta":%b%b}' % (
            output.index,
            delta,
            extras or b',"logprobs":null,"finish_reason":null',
        )
        return self._writer.choices(choice, output.generation)

    def _extras(self, delta: Delta) -> bytes:
        """What most events don't have: logprobs, token ids, the end."""
        if delta.finish_reason is None and not (delta.logprobs or self._options.return_token_ids):
            return b""
        fields: dict[str, Any] = {
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            fields["stop_reason"] = delta.stop_reason
        if self._options.return_token_ids:
            fields["token_ids"] = delta.token_ids
        return b"," + encode_json(fields)[1:-1]

    def _choice(self, output: Output, delta: Delta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": output.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._options.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not delta.logprobs:
            return None
        return chat_logprobs(self._names, delta.token_ids, delta.logprobs)
