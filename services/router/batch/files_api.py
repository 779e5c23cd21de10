"""/v1/files: what batches read and write."""

from collections.abc import AsyncIterator

from redis.exceptions import RedisError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from protocol.errors import InvalidRequestError
from services.router.batch.files import FileGoneError, FileRecord, FileStore
from services.router.batch.storage import reaching_storage
from services.router.batch.upload import Form, read_upload
from services.router.http.errors import HttpError
from services.router.http.pages import list_answer, read_page_query
from services.router.openai.answers import encode_json

PURPOSE = "batch"
OUTPUT_PURPOSE = "batch_output"
# OpenAI's bounds of what a client may ask for.
MIN_TTL_S = 3600
MAX_TTL_S = 30 * 86_400
UPLOAD_SCHEMA = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": [PURPOSE]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_TTL_S, "maximum": MAX_TTL_S},
    },
}
_MAX_LIMIT = 10_000
# A slow client may take its time to upload; each wait for Redis has its own deadline.
_UPLOAD_DEADLINE_S = 3600.0


class FilesApi:
    """Answers requests about files. Its errors are TandemErrors."""

    def __init__(self, files: FileStore, *, max_file_bytes: int) -> None:
        self._files = files
        self._max_file_bytes = max_file_bytes

    async def create(self, request: Request) -> Response:
        writer = self._files.writer()
        async with reaching_storage(_UPLOAD_DEADLINE_S):
            try:
                form = await read_upload(request, writer.write, max_file_bytes=self._max_file_bytes)
                _check_purpose(form)
                record = await writer.finish(
                    filename=form.filename or "file",
                    purpose=PURPOSE,
                    ttl_s=_ttl_s(form, default_s=self._files.ttl_s),
                )
            except BaseException:
                await writer.discard()
                raise
        return _json(record.view())

    async def list(self, request: Request) -> Response:
        query = read_page_query(
            request.query_params, default_limit=_MAX_LIMIT, max_limit=_MAX_LIMIT
        )
        purpose = request.query_params.get("purpose")

        def wanted(record: FileRecord) -> bool:
            return purpose is None or record.purpose == purpose

        async with reaching_storage():
            records, has_more = await self._files.page(query, wanted=wanted)
        return _json(list_answer([record.view() for record in records], has_more=has_more))

    async def get(self, request: Request) -> Response:
        return _json((await self._found(request)).view())

    async def content(self, request: Request) -> Response:
        record = await self._found(request)
        return StreamingResponse(
            self._body(record),
            headers={"content-length": str(record.bytes)},
            media_type="application/octet-stream",
        )

    async def delete(self, request: Request) -> Response:
        record = await self._found(request)
        async with reaching_storage():
            await self._files.delete(record)
        return _json({"id": record.id, "object": "file", "deleted": True})

    async def _body(self, record: FileRecord) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._files.chunks(record):
                yield chunk
        except (FileGoneError, RedisError, OSError) as error:
            # The head is sent: a body that ends early is all that can still be said.
            raise ConnectionAbortedError(f"the content of {record.id} ends early") from error

    async def _found(self, request: Request) -> FileRecord:
        file_id = request.path_params["file_id"]
        async with reaching_storage():
            record = await self._files.get(file_id)
        if record is None:
            raise HttpError(404, f"There is no file `{file_id}`.", code="file_not_found")
        return record


def _check_purpose(form: Form) -> None:
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise InvalidRequestError(
            "`purpose` is required.", field="purpose", code="missing_required_parameter"
        )
    if purpose != PURPOSE:
        raise InvalidRequestError("`purpose` must be batch.", field="purpose")


def _ttl_s(form: Form, *, default_s: int) -> int:
    seconds = form.fields.get("expires_after[seconds]")
    if form.fields.get("expires_after[anchor]", "created_at") != "created_at":
        raise InvalidRequestError(
            "`expires_after[anchor]` must be created_at.", field="expires_after[anchor]"
        )
    if seconds is None:
        return default_s
    if not seconds.isdecimal() or not MIN_TTL_S <= int(seconds) <= MAX_TTL_S:
        raise InvalidRequestError(
            f"`expires_after[seconds]` must be from {MIN_TTL_S} to {MAX_TTL_S}.",
            field="expires_after[seconds]",
        )
    return int(seconds)


def _json(content: dict[str, object]) -> Response:
    return Response(encode_json(content), media_type="application/json")
