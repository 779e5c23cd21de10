"""Reads a `multipart/form-data` upload as it comes: small fields, and one file."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from protocol.errors import InvalidRequestError
from services.router.http.errors import HttpError

# What it has to say is in its exceptions, and so in the client's answer.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

FILE_FIELD = "file"
_MAX_FIELD_BYTES = 4096
_MAX_FIELDS = 32


@dataclass(slots=True)
class Form:
    """The fields by name; `filename` is None until the file's part has begun."""

    fields: dict[str, str] = field(default_factory=dict[str, str])
    filename: str | None = None


class _Parts:
    """The parser's callbacks: keeps fields, and what came of the file since the last `take`."""

    def __init__(self) -> None:
        self.form = Form()
        self.ended = False
        self._file_data: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._name = ""
        self._value = b""
        self._is_file = False

    def take(self) -> bytes:
        data, self._file_data = b"".join(self._file_data), []
        return data

    def on_part_begin(self) -> None:
        self._headers = {}
        self._value = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = self._name == FILE_FIELD
        if self._is_file:
            if self.form.filename is not None:
                raise InvalidRequestError("`file` is given twice.", field=FILE_FIELD)
            self.form.filename = options.get(b"filename", b"").decode(errors="replace") or "file"

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._file_data.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidRequestError(f"`{self._name}` is too long.", field=self._name)

    def on_part_end(self) -> None:
        if not self._is_file and len(self.form.fields) < _MAX_FIELDS:
            self.form.fields[self._name] = self._value.decode(errors="replace")

    def on_end(self) -> None:
        self.ended = True


async def read_upload(
    request: Request, write: Callable[[bytes], Awaitable[None]], *, max_file_bytes: int
) -> Form:
    """Gives the file to `write`, piece by piece. Raises InvalidRequestError and HttpError."""
    content_type, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if content_type != b"multipart/form-data" or not boundary:
        raise InvalidRequestError(
            "Send the file as multipart/form-data, with the fields `file` and `purpose`.",
            field=FILE_FIELD,
            code="invalid_content_type",
        )
    parts = _Parts()
    num_bytes = 0
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": parts.on_part_begin,
                "on_header_field": parts.on_header_field,
                "on_header_value": parts.on_header_value,
                "on_header_end": parts.on_header_end,
                "on_headers_finished": parts.on_headers_finished,
                "on_part_data": parts.on_part_data,
                "on_part_end": parts.on_part_end,
                "on_end": parts.on_end,
            },
        )
        async for piece in request.stream():
            parser.write(piece)
            data = parts.take()
            num_bytes += len(data)
            if num_bytes > max_file_bytes:
                raise _too_long(max_file_bytes)
            await write(data)
    except FormParserError as error:
        raise InvalidRequestError(
            f"The form can't be read: {error}.", field=None, code="invalid_form"
        ) from error
    if not parts.ended:
        raise InvalidRequestError("The form ends early.", field=None, code="invalid_form")
    if parts.form.filename is None:
        raise InvalidRequestError(
            "`file` is required.", field=FILE_FIELD, code="missing_required_parameter"
        )
    return parts.form


def _too_long(max_bytes: int) -> HttpError:
    return HttpError(
        413,
        f"`file` is longer than {max_bytes} bytes.",
        code="request_too_large",
        headers={"Connection": "close"},
    )
