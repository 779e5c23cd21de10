"""/v1/messages: Anthropic's Messages API, translated to a chat and back."""

from fastapi import Request, Response

from services.router.http.body import BodyReader
from services.router.messages.answers import MessagesAnswers
from services.router.messages.bodies import MessagesBody, PromptBody
from services.router.messages.input import FIELD_NAMES, chat_body, prompt_chat_body
from services.router.openai.answers import AnswerFormat, AnswerHead, encode_json
from services.router.openai.api import OpenAIApi
from services.router.openai.chat_fields import fields_named
from services.router.openai.chat_reader import ReadingRules
from services.router.openai.logprobs import TokenNames


class MessagesApi:
    """Its errors are TandemErrors, which the app puts into words."""

    def __init__(self, openai: OpenAIApi, *, max_body_bytes: int) -> None:
        self._openai = openai
        self._bodies = BodyReader(MessagesBody, max_bytes=max_body_bytes)
        self._prompt_bodies = BodyReader(PromptBody, max_bytes=max_body_bytes)

    async def create(self, request: Request) -> Response:
        body = await self._bodies.read(request)
        with fields_named(FIELD_NAMES):
            chat = chat_body(body)
            if not self._openai.can_limit_thoughts:
                # This API has no thoughts without a budget, which is no promise to use it up.
                chat.thinking_token_budget = None
            return await self._openai.answer_chat(request, chat, _answers, id_prefix="msg_")

    async def count_tokens(self, request: Request) -> Response:
        body = await self._prompt_bodies.read(request)
        with fields_named(FIELD_NAMES):
            num_tokens = await self._openai.count_prompt_tokens(prompt_chat_body(body))
        return Response(encode_json({"input_tokens": num_tokens}), media_type="application/json")


def _answers(head: AnswerHead, names: TokenNames, reading: ReadingRules) -> AnswerFormat:  # noqa: ARG001
    return MessagesAnswers(head, reading)
