"""/v1/responses/{id}: what is kept of responses, and the end of those in the background."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response

from protocol.errors import InvalidRequestError
from services.router.http.errors import HttpError
from services.router.http.pages import list_answer, read_page_query
from services.router.openai.answers import encode_json
from services.router.openai.unsupported import unsupported
from services.router.responses.background import as_clients_see_it, is_background, is_open
from services.router.responses.items import check_include, listed, page_of
from services.router.responses.store import Kept, ResponseStore


class KeptResponsesApi:
    """Any router answers for any response. Its errors are TandemErrors."""

    def __init__(self, store: ResponseStore, abort: Callable[[str], Awaitable[None]]) -> None:
        """`abort` ends a request, whichever router has it, as soon as that can be done."""
        self._store = store
        self._abort = abort

    async def retrieve(self, response_id: str, request: Request) -> Response:
        if request.query_params.get("stream", "false") != "false":
            raise unsupported("stream")
        return json_answer(as_clients_see_it(await self._get(response_id)).answer)

    async def input_items(self, response_id: str, request: Request) -> Response:
        query = read_page_query(request.query_params, default_limit=20, max_limit=100)
        check_include(request.query_params)
        items = (await self._get(response_id)).record.input
        if not query.ascending:
            items = items[::-1]
        page, has_more = page_of(items, after=query.after, limit=query.limit)
        return json_answer(list_answer([listed(item) for item in page], has_more=has_more))

    async def cancel(self, response_id: str) -> Response:
        """Once it's over, that is the answer."""
        kept = await self._get(response_id)
        if not is_background(kept.record):
            raise InvalidRequestError(
                "Only a response that runs in the background can be cancelled.",
                field="response_id",
                code="not_in_background",
            )
        while kept.runner is not None and is_open(kept.record):
            cancelled = kept.record.with_answer(status="cancelled")
            if await self._store.put(response_id, cancelled, runner=kept.runner):
                await self._abort(response_id)
                return json_answer(cancelled.answer)
            # It has just ended otherwise.
            kept = await self._get(response_id)
        return json_answer(as_clients_see_it(kept).answer)

    async def delete(self, response_id: str) -> Response:
        kept = await self._store.get(response_id)
        if not await self._store.delete(response_id):
            raise _not_found(response_id)
        if kept is not None and kept.runner is not None:
            await self._abort(response_id)
        return json_answer({"id": response_id, "object": "response", "deleted": True})

    async def _get(self, response_id: str) -> Kept:
        kept = await self._store.get(response_id)
        if kept is None:
            raise _not_found(response_id)
        return kept


def json_answer(content: Any) -> Response:  # noqa: ANN401
    return Response(encode_json(content), media_type="application/json")


def _not_found(response_id: str) -> HttpError:
    text = f"There is no response {response_id[:80]!r}, or none any more."
    return HttpError(404, text, code="response_not_found")
