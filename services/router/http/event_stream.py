"""Sends a generation as server-sent events, no faster than the client reads."""

from fastapi import Response
from starlette.types import Receive, Scope, Send

from services.router.dispatch.generation import Generation
from services.router.http.open_request import OpenRequest
from services.router.openai.answers import AnswerFormat

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would gather events otherwise.
    (b"x-accel-buffering", b"no"),
]


class EventStream(Response):
    """The streamed answer of a generation whose first output is there already.

    One write for all news since the last one: when the client reads slowly, `send` waits, and
    what comes meanwhile is gathered in the outputs, whose length is bounded.
    """

    def __init__(self, request: OpenRequest, answers: AnswerFormat) -> None:
        super().__init__()
        self._request = request
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        with self._request:
            generation = self._request.generation
            request_id = (b"x-request-id", generation.request_id.encode())
            await send(
                {"type": "http.response.start", "status": 200, "headers": [*_HEADERS, request_id]}
            )
            is_last = False
            while not is_last:
                is_last = generation.is_done
                body = self._news(generation)
                if is_last:
                    body += await self._answers.end(generation)
                if body or is_last:
                    more = not is_last
                    await send({"type": "http.response.body", "body": body, "more_body": more})
                if not is_last:
                    await generation.news()

    def _news(self, generation: Generation) -> bytes:
        answers = self._answers
        return b"".join(
            [
                answers.chunk(output, output.choice.take())
                for output in generation.outputs
                if output.choice.has_news
            ]
        )
