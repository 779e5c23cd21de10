"""/v1/responses: OpenAI's Responses API, translated to a chat and back."""

from collections.abc import Sequence

from fastapi import Request, Response

from protocol.errors import ContextLengthError, InvalidRequestError
from services.router.http.body import BodyReader
from services.router.http.errors import HttpError
from services.router.openai.answers import AnswerFormat, AnswerHead, encode_json
from services.router.openai.api import OpenAIApi
from services.router.openai.bodies import Message
from services.router.openai.chat_fields import fields_named
from services.router.openai.chat_reader import ReadingRules
from services.router.openai.logprobs import TokenNames
from services.router.openai.prompts import PromptEncoder
from services.router.openai.unsupported import unsupported
from services.router.responses.answers import Question, ResponsesAnswers
from services.router.responses.bodies import ResponsesBody
from services.router.responses.input import (
    FIELD_NAMES,
    chat_body,
    input_messages,
    refuse_unsupported_response,
    shortened,
)
from services.router.responses.store import ResponseStore


class ResponsesApi:
    """Its errors are TandemErrors, which the app puts into words."""

    def __init__(
        self,
        openai: OpenAIApi,
        store: ResponseStore,
        encoder: PromptEncoder,
        *,
        max_body_bytes: int,
    ) -> None:
        self._openai = openai
        self._store = store
        self._encoder = encoder
        self._bodies = BodyReader(ResponsesBody, max_bytes=max_body_bytes)

    async def create(self, request: Request) -> Response:
        body = await self._bodies.read(request)
        refuse_unsupported_response(body)
        conversation = await self._previous(body.previous_response_id)
        conversation += input_messages(body.input)
        store = self._store if self._store.keeps and body.store is not False else None

        def make(head: AnswerHead, names: TokenNames, reading: ReadingRules) -> AnswerFormat:
            return ResponsesAnswers(
                Question(body, conversation, head),
                names,
                reading,
                store=store,
                count_tokens=self._count_tokens,
            )

        async def answer(messages: Sequence[Message]) -> Response:
            chat = chat_body(body, messages)
            return await self._openai.answer_chat(request, chat, make, id_prefix="resp_")

        shorter = shortened(conversation) if body.truncation == "auto" else []
        with fields_named(FIELD_NAMES):
            for i, messages in enumerate([conversation, *shorter]):
                try:
                    return await answer(messages)
                except ContextLengthError:
                    if i == len(shorter):
                        raise
        raise AssertionError("the last attempt answers or raises")

    async def retrieve(self, response_id: str, request: Request) -> Response:
        if request.query_params.get("stream", "false") != "false":
            raise unsupported("stream")
        record = await self._store.get(response_id)
        if record is None:
            raise _not_found(response_id)
        return Response(bytes(record.answer), media_type="application/json")

    async def delete(self, response_id: str) -> Response:
        if not await self._store.delete(response_id):
            raise _not_found(response_id)
        answer = {"id": response_id, "object": "response", "deleted": True}
        return Response(encode_json(answer), media_type="application/json")

    async def _previous(self, response_id: str | None) -> list[Message]:
        if response_id is None:
            return []
        record = await self._store.get(response_id)
        if record is None:
            raise InvalidRequestError(
                f"There is no response {response_id[:80]!r}, or none any more.",
                field="previous_response_id",
                code="previous_response_not_found",
            )
        return record.conversation

    async def _count_tokens(self, text: str) -> int:
        prompt = await self._encoder.text_prompt(text, field="output", add_special_tokens=False)
        return len(prompt.token_ids)


def _not_found(response_id: str) -> HttpError:
    text = f"There is no response {response_id[:80]!r}, or none any more."
    return HttpError(404, text, code="response_not_found")
