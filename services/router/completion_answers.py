"""Answers of /v1/completions."""

from typing import Any

from engine.tokenizer import Tokenizer
from services.router.answers import (
    AnswerHead,
    AnswerOptions,
    ChunkWriter,
    encode_json,
    usage_of,
)
from services.router.choice import Delta
from services.router.generation import Generation, Output
from services.router.logprobs import TokenNames, completion_logprobs


class CompletionAnswers:
    """One request's answer. An `AnswerFormat`."""

    def __init__(
        self, head: AnswerHead, options: AnswerOptions, names: TokenNames, tokenizer: Tokenizer
    ) -> None:
        self._head = head
        self._options = options
        self._names = names
        self._tokenizer = tokenizer
        self._writer = ChunkWriter(head, "text_completion", options)
        self._opened: set[int] = set()
        self._offsets: dict[int, int] = {}

    async def whole(self, generation: Generation) -> bytes:
        choices = [self._choice(output, output.choice.take()) for output in generation.outputs]
        return encode_json(
            {
                "id": self._head.id,
                "object": "text_completion",
                "created": self._head.created,
                "model": self._head.model,
                "choices": choices,
                "usage": usage_of(generation),
            }
        )

    def chunk(self, output: Output, delta: Delta) -> bytes:
        if not (
            delta.finish_reason
            or delta.logprobs
            or self._options.return_token_ids
            or self._options.echo
        ):
            choice = b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":null}' % (
                output.index,
                encode_json(delta.text),
            )
        else:
            choice = encode_json(self._choice(output, delta))
        return self._writer.choices(choice, output.generation)

    async def end(self, generation: Generation) -> bytes:
        return self._writer.end(generation)

    def _choice(self, output: Output, delta: Delta) -> dict[str, Any]:
        is_first = output.index not in self._opened
        self._opened.add(output.index)
        prompt = output.generation.spec.prompts[output.prompt_index]
        text = delta.text
        if self._options.echo and is_first:
            text = self._echo(prompt.text, prompt.token_ids) + text
        choice: dict[str, Any] = {
            "index": output.index,
            "text": text,
            "logprobs": self._logprobs(output, delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._options.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if is_first:
                choice["prompt_token_ids"] = prompt.token_ids
        return choice

    def _echo(self, text: str | None, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids) if text is None else text

    def _logprobs(self, output: Output, delta: Delta) -> dict[str, Any] | None:
        if not delta.logprobs:
            return None
        entry, self._offsets[output.index] = completion_logprobs(
            self._names,
            delta.token_ids,
            delta.logprobs,
            first_offset=self._offsets.get(output.index, 0),
        )
        return entry
