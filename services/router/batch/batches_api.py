"""/v1/batches: files of requests, run when the workers have time for them."""

import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from protocol.errors import InvalidRequestError
from services.router.batch.files import FileStore
from services.router.batch.files_api import MAX_TTL_S, MIN_TTL_S, PURPOSE
from services.router.batch.records import BatchRecord, batch_view
from services.router.batch.storage import reaching_storage
from services.router.batch.store import BatchStore
from services.router.http.body import BodyReader
from services.router.http.errors import HttpError
from services.router.http.pages import list_answer, read_page_query
from services.router.openai.answers import encode_json

_WINDOW = re.compile(r"(?P<count>[1-9][0-9]{0,4})(?P<unit>[mhd])")
_UNIT_S = {"m": 60, "h": 3600, "d": 86_400}
_MAX_METADATA = 16
_MAX_KEY_LENGTH = 64
_MAX_VALUE_LENGTH = 512


class OutputExpiresAfter(msgspec.Struct, kw_only=True):
    seconds: Annotated[int, msgspec.Meta(ge=MIN_TTL_S, le=MAX_TTL_S)]
    anchor: Literal["created_at"] = "created_at"


class BatchBody(msgspec.Struct, kw_only=True):
    """`completion_window` is a number of minutes, hours or days, such as 24h."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: OutputExpiresAfter | None = None


class BatchesApi:
    """Answers requests about batches. Its errors are TandemErrors."""

    def __init__(
        self,
        batches: BatchStore,
        files: FileStore,
        *,
        endpoints: Sequence[str],
        on_created: Callable[[], None],
    ) -> None:
        self._batches = batches
        self._files = files
        self._endpoints = endpoints
        self._on_created = on_created
        self._bodies = BodyReader(BatchBody, max_bytes=65_536)

    async def create(self, request: Request) -> Response:
        body = await self._bodies.read(request)
        if body.endpoint not in self._endpoints:
            raise InvalidRequestError(
                f"`endpoint` must be one of {', '.join(self._endpoints)}.", field="endpoint"
            )
        window_s = _window_s(body.completion_window)
        _check_metadata(body.metadata)
        created_at = int(time.time())
        expires_after = body.output_expires_after
        record = BatchRecord(
            id=f"batch_{secrets.token_hex(12)}",
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            created_at=created_at,
            expires_at=created_at + window_s,
            output_ttl_s=self._files.ttl_s if expires_after is None else expires_after.seconds,
            metadata=body.metadata,
        )
        async with reaching_storage():
            file = await self._files.get(body.input_file_id)
            if file is None or file.purpose != PURPOSE:
                raise InvalidRequestError(
                    f"There is no file `{body.input_file_id}` with the purpose {PURPOSE}.",
                    field="input_file_id",
                    code="file_not_found",
                )
            await self._batches.create(record)
        self._on_created()
        return await self._answer(record)

    async def get(self, request: Request) -> Response:
        return await self._answer(await self._found(request))

    async def list(self, request: Request) -> Response:
        query = read_page_query(request.query_params, default_limit=20, max_limit=100)
        async with reaching_storage():
            records, has_more = await self._batches.page(query)
            views = [
                batch_view(record, await self._batches.progress(record.id)) for record in records
            ]
        return _json(list_answer(views, has_more=has_more))

    async def cancel(self, request: Request) -> Response:
        record = await self._found(request)
        if record.is_over:
            raise HttpError(
                409, f"The batch is {record.status} already.", code="batch_not_cancellable"
            )
        async with reaching_storage():
            await self._batches.cancel(record, now=time.time())
        return await self._answer(record)

    async def _found(self, request: Request) -> BatchRecord:
        batch_id = request.path_params["batch_id"]
        async with reaching_storage():
            record = await self._batches.get(batch_id)
        if record is None:
            raise HttpError(404, f"There is no batch `{batch_id}`.", code="batch_not_found")
        return record

    async def _answer(self, record: BatchRecord) -> Response:
        async with reaching_storage():
            progress = await self._batches.progress(record.id)
        return _json(batch_view(record, progress))


def _window_s(text: str) -> int:
    found = _WINDOW.fullmatch(text)
    seconds = int(found["count"]) * _UNIT_S[found["unit"]] if found else 0
    if not 0 < seconds <= MAX_TTL_S:
        raise InvalidRequestError(
            "`completion_window` must be a time such as 24h, 30 days at most.",
            field="completion_window",
        )
    return seconds


def _check_metadata(metadata: dict[str, str] | None) -> None:
    metadata = metadata or {}
    if len(metadata) > _MAX_METADATA or any(
        len(key) > _MAX_KEY_LENGTH or len(value) > _MAX_VALUE_LENGTH
        for key, value in metadata.items()
    ):
        raise InvalidRequestError(
            f"`metadata` takes {_MAX_METADATA} pairs, keys of {_MAX_KEY_LENGTH} and values of "
            f"{_MAX_VALUE_LENGTH} characters at most.",
            field="metadata",
        )


def _json(content: dict[str, object]) -> Response:
    return Response(encode_json(content), media_type="application/json")
