"""Reads request bodies: bounded, strict, and precise about what is wrong with them."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, Generic, TypeVar, cast

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect

from protocol.decoding import decode
from protocol.errors import InvalidRequestError, UnreadableError
from services.router.http.errors import HttpError
from services.router.http.headers import header

Body = TypeVar("Body", bound=msgspec.Struct)

_PATH = re.compile(r"(?P<what>.*) - at `\$\.?(?P<path>.*)`", re.DOTALL)
# How it says that a value has the right type, and is too small or too large.
_BOUND = re.compile(r" [<>]=? ")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]+)`")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")


class BodyReader(Generic[Body]):
    """Turns the body of a request into one of the API's typed bodies."""

    def __init__(self, kind: type[Body], *, max_bytes: int) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._max_bytes = max_bytes

    async def read(self, request: Request) -> Body:
        """Raises InvalidRequestError that names the field, HttpError if the body is too long."""
        data = await read_bytes(request, max_bytes=self._max_bytes)
        return self.parse(data)

    def parse(self, data: bytes) -> Body:
        if not data.strip():
            raise InvalidRequestError("The request body is empty.", field=None, code="invalid_json")
        try:
            return decode(self._decoder, data)
        except UnreadableError as error:
            raise _refusal(data, error) from error


async def read_bytes(request: Request, *, max_bytes: int) -> bytes:
    """The whole body. Raises HttpError as soon as it is known to be longer than `max_bytes`."""
    declared = header(request.scope, b"content-length") or b""
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_long(max_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise _too_long(max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_long(max_bytes: int) -> HttpError:
    return HttpError(
        413,
        f"The request body is longer than {max_bytes} bytes.",
        code="request_too_large",
        headers={"Connection": "close"},
    )


def invalid_value(text: str) -> InvalidRequestError:
    """What msgspec says is wrong with a body, for its sender."""
    found = _PATH.fullmatch(text)
    what, path = (found["what"], found["path"]) if found else (text, "")
    if missing := _MISSING.search(what):
        path = f"{path}.{missing['name']}" if path else missing["name"]
        return InvalidRequestError(
            f"`{path}` is required.", field=path, code="missing_required_parameter"
        )
    if unknown := _UNKNOWN.search(what):
        path = f"{path}.{unknown['name']}" if path else unknown["name"]
        return InvalidRequestError(f"There is no `{path}`.", field=path, code="unknown_parameter")
    if not path:
        return InvalidRequestError(f"The request body: {what}.", field=None, code="invalid_type")
    is_type = what.startswith("Expected") and not _BOUND.search(what)
    code = "invalid_type" if is_type else "invalid_value"
    return InvalidRequestError(f"`{path}`: {what}.", field=path, code=code)


def _refusal(data: bytes, unreadable: UnreadableError) -> InvalidRequestError:
    match unreadable.__cause__:
        case msgspec.ValidationError() as error:
            return invalid_value(str(error))
        case UnicodeDecodeError() as error:
            text = f"The request body isn't valid UTF-8: {error.reason}."
            return InvalidRequestError(text, field=None, code="invalid_utf8")
        case RecursionError():
            text = "The request body is nested too deeply."
            return InvalidRequestError(text, field=None, code="invalid_json")
        case _:
            return _malformed(data, str(unreadable))


def _malformed(data: bytes, text: str) -> InvalidRequestError:
    """JSON has no NaN and no Infinity, but many clients write them: their field gets named."""
    try:
        path = next(_non_finite(json.loads(data), ""), None)
    except (ValueError, RecursionError):
        path = None
    if path is not None:
        # Unlike msgspec, the json module lets half a surrogate pair through.
        path = path.encode(errors="replace").decode()
        return InvalidRequestError(f"`{path}` must be a finite number.", field=path)
    return InvalidRequestError(
        f"The request body isn't valid JSON: {text}.", field=None, code="invalid_json"
    )


def _non_finite(value: Any, path: str) -> Iterator[str]:  # noqa: ANN401  (any JSON value)
    match value:
        case float() if not math.isfinite(value):
            yield path
        case dict():
            for key, inner in cast("dict[str, Any]", value).items():
                yield from _non_finite(inner, f"{path}.{key}" if path else key)
        case list():
            for i, inner in enumerate(cast("list[Any]", value)):
                yield from _non_finite(inner, f"{path}[{i}]")
        case _:
            pass
