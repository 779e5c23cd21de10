"""Answers of /v1/completions."""

from typing import Any

from engine.tokenizer import Tokenizer
from protocol.request import TokenLogprobs
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
from services.router.openai.logprobs import TokenNames, completion_logprobs, named_prompt_logprobs


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
        choices = [self._choice(*answered) for answered in best_outputs(generation)]
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
            choice = encode_json(self._choice(output.index, output, delta))
        return self._writer.choices(choice, output.generation)

    async def end(self, generation: Generation) -> bytes:
        return self._writer.end(generation)

    def _choice(self, index: int, output: Output, delta: Delta) -> dict[str, Any]:
        is_first = output.index not in self._opened
        self._opened.add(output.index)
        spec = output.generation.spec
        prompt = spec.prompts[output.prompt_index]
        if spec.is_prompt_only:
            delta = Delta(finish_reason=delta.finish_reason)
        text = delta.text
        if self._options.echo and is_first:
            text = self._echo(prompt.text, prompt.token_ids) + text
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(output, delta, echoes=self._options.echo and is_first),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._options.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if is_first:
                choice["prompt_token_ids"] = prompt.token_ids
        prompt_logprobs = output.first.prompt_logprobs
        if self._options.prompt_logprobs and is_first and prompt_logprobs is not None:
            choice["prompt_logprobs"] = named_prompt_logprobs(
                self._names, prompt.token_ids, prompt_logprobs
            )
        return choice

    def _echo(self, text: str | None, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids) if text is None else text

    def _logprobs(self, output: Output, delta: Delta, *, echoes: bool) -> dict[str, Any] | None:
        """The prompt's come first if it's echoed; nothing precedes its first token."""
        if not self._options.logprobs:
            return None
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        if echoes:
            token_ids += output.generation.spec.prompts[output.prompt_index].token_ids
            logprobs += [None, *(output.first.prompt_logprobs or ())]
        token_ids += delta.token_ids
        logprobs += delta.logprobs
        if not logprobs:
            return None
        entry, self._offsets[output.index] = completion_logprobs(
            self._names, token_ids, logprobs, first_offset=self._offsets.get(output.index, 0)
        )
        return entry
