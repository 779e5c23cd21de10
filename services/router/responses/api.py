"""/v1/responses: OpenAI's Responses API, translated to a chat and back."""

from collections.abc import Awaitable, Callable, Sequence

from fastapi import Request, Response

from protocol.errors import ContextLengthError, InvalidRequestError
from services.router.http.body import BodyReader
from services.router.openai.answers import AnswerFormat, AnswerHead
from services.router.openai.api import Follower, OpenAIApi
from services.router.openai.bodies import Message
from services.router.openai.chat_fields import fields_named
from services.router.openai.chat_reader import ReadingRules
from services.router.openai.logprobs import TokenNames
from services.router.openai.prompts import PromptEncoder
from services.router.openai.unsupported import unsupported
from services.router.responses.answers import Keep, Question, ResponsesAnswers
from services.router.responses.background import (
    BackgroundRun,
    BackgroundRuns,
    as_clients_see_it,
    is_open,
)
from services.router.responses.bodies import InputItem, ResponsesBody
from services.router.responses.input import (
    FIELD_NAMES,
    chat_body,
    input_messages,
    refuse_unsupported_response,
    shortened,
)
from services.router.responses.items import conversation_of, said_items, with_ids
from services.router.responses.kept_api import json_answer
from services.router.responses.store import ResponseStore, StoredResponse

MakeAnswers = Callable[[AnswerHead, TokenNames, ReadingRules], ResponsesAnswers]


class ResponsesApi:
    """Makes them. Its errors are TandemErrors, which the app puts into words."""

    def __init__(
        self,
        openai: OpenAIApi,
        store: ResponseStore,
        runs: BackgroundRuns,
        encoder: PromptEncoder,
        *,
        max_body_bytes: int,
    ) -> None:
        self._openai = openai
        self._store = store
        self._runs = runs
        self._encoder = encoder
        self._bodies = BodyReader(ResponsesBody, max_bytes=max_body_bytes)

    async def create(self, request: Request) -> Response:
        body = await self._bodies.read(request)
        refuse_unsupported_response(body)
        if body.background:
            self._check_background(body)
        previous = await self._previous(body.previous_response_id)
        given = input_messages(body.input)
        items: list[InputItem] = []
        conversation: list[Message] = []
        if previous is not None:
            items = [*previous.input, *said_items(previous)]
            conversation = conversation_of(previous)
        items += with_ids(body.input, taken={item.id or "" for item in items})
        conversation += given

        def make(keep: Keep | None) -> MakeAnswers:
            return lambda head, names, reading: ResponsesAnswers(
                Question(body, items, head),
                names,
                reading,
                keep=keep,
                count_tokens=self._count_tokens,
            )

        if body.background:
            record = await self._runs.start(
                lambda run: self._ask_for(run, request, body, conversation, make(run.keep))
            )
            return json_answer(record.answer)
        keep = self._store.put if self._store.keeps and body.store is not False else None
        return await self._ask(request, body, conversation, make(keep))

    async def _ask_for(
        self,
        run: BackgroundRun,
        request: Request,
        body: ResponsesBody,
        conversation: Sequence[Message],
        make: MakeAnswers,
    ) -> Response:
        def make_for(head: AnswerHead, names: TokenNames, reading: ReadingRules) -> AnswerFormat:
            run.answers = make(head, names, reading)
            return run.answers

        # Nobody's connection ends it.
        scope = {name: value for name, value in request.scope.items() if name != "extensions"}
        return await self._ask(Request(scope), body, conversation, make_for, follower=run)

    async def _ask(
        self,
        request: Request,
        body: ResponsesBody,
        conversation: Sequence[Message],
        make: Callable[[AnswerHead, TokenNames, ReadingRules], AnswerFormat],
        *,
        follower: Follower | None = None,
    ) -> Response:
        def answer(messages: Sequence[Message]) -> Awaitable[Response]:
            chat = chat_body(body, messages)
            return self._openai.answer_chat(
                request, chat, make, id_prefix="resp_", follower=follower
            )

        shorter = shortened(conversation) if body.truncation == "auto" else []
        with fields_named(FIELD_NAMES):
            for i, messages in enumerate([conversation, *shorter]):
                try:
                    return await answer(messages)
                except ContextLengthError:
                    if i == len(shorter):
                        raise
        raise AssertionError("the last attempt answers or raises")

    def _check_background(self, body: ResponsesBody) -> None:
        if not self._store.keeps:
            raise unsupported("background", "Without --response-ttl-s `background`")
        if body.store is False:
            text = "`background` needs `store`: where else should the answer be?"
            raise InvalidRequestError(text, field="background")
        if body.stream:
            raise unsupported("stream", "`stream` of a background response")

    async def _previous(self, response_id: str | None) -> StoredResponse | None:
        if response_id is None:
            return None
        kept = await self._store.get(response_id)
        if kept is None:
            raise InvalidRequestError(
                f"There is no response {response_id[:80]!r}, or none any more.",
                field="previous_response_id",
                code="previous_response_not_found",
            )
        record = as_clients_see_it(kept)
        if is_open(record):
            raise InvalidRequestError(
                f"The response {response_id[:80]!r} isn't over yet.",
                field="previous_response_id",
                code="previous_response_not_over",
            )
        return record

    async def _count_tokens(self, text: str) -> int:
        prompt = await self._encoder.text_prompt(text, field="output", add_special_tokens=False)
        return len(prompt.token_ids)
