"""What a client is told when its request can't be served, in OpenAI's shape or Anthropic's."""

from dataclasses import dataclass, field

import msgspec
from fastapi import Response

from protocol.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    ServiceUnavailableError,
    TandemError,
    WorkerLostError,
)


class HttpError(TandemError):
    """An error of HTTP itself: no such path, no key, too long a body."""

    def __init__(
        self, status: int, message: str, *, code: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


class RequestTimeoutError(TandemError):
    """The request wasn't finished within the time that the server gives one."""


class RequestRefusedError(TandemError):
    """The workers can't serve this request, now or later: it's too large for their memory."""


class StorageUnavailableError(TandemError):
    """Redis, where files and batches are kept, doesn't answer or has no room."""


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """Status, headers and body of an answer that says no."""

    status: int
    detail: ErrorDetail
    headers: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def body(self) -> bytes:
        return msgspec.json.encode({"error": self.detail})

    @property
    def messages_body(self) -> bytes:
        """In the shape of Anthropic's API, which has no place for a field but the text."""
        default = "api_error" if self.status >= 500 else "invalid_request_error"
        kind = _MESSAGES_KINDS.get(self.status, default)
        field, message = self.detail.param, self.detail.message
        if field is not None and field not in message:
            message = f"`{field}`: {message}"
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message}})

    def response_at(self, path: str) -> Response:
        """In the shape of the API that has this path."""
        body = self.messages_body if path.startswith("/v1/messages") else self.body
        return Response(body, self.status, headers=self.headers, media_type="application/json")


def error_reply(error: TandemError) -> ErrorReply:
    """The answer to a request that ended with `error`."""
    text = str(error)
    match error:
        case InvalidRequestError(message=message, field=param, code=code):
            return ErrorReply(400, ErrorDetail(message, "invalid_request_error", param, code))
        case ModelNotFoundError():
            detail = ErrorDetail(text, "invalid_request_error", "model", "model_not_found")
            return ErrorReply(404, detail)
        case OverloadedError(retry_after_s=retry_after_s):
            headers = {"Retry-After": str(max(1, round(retry_after_s)))}
            return ErrorReply(
                429, ErrorDetail(text, "rate_limit_error", None, "overloaded"), headers
            )
        case ServiceUnavailableError():
            return ErrorReply(
                503, ErrorDetail(text, "service_unavailable_error", None, "no_worker")
            )
        case WorkerLostError():
            return ErrorReply(
                503, ErrorDetail(text, "service_unavailable_error", None, "worker_lost")
            )
        case RequestRefusedError():
            return ErrorReply(
                400, ErrorDetail(text, "invalid_request_error", None, "request_refused")
            )
        case StorageUnavailableError():
            return ErrorReply(
                503, ErrorDetail(text, "service_unavailable_error", None, "storage_unavailable")
            )
        case RequestTimeoutError():
            return ErrorReply(504, ErrorDetail(text, "timeout_error", None, "timeout"))
        case HttpError(status=status, code=code, headers=headers):
            kind = _KINDS.get(status, "invalid_request_error")
            return ErrorReply(status, ErrorDetail(text, kind, None, code), headers)
        case _:
            return INTERNAL_ERROR


_MESSAGES_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
_KINDS = {401: "authentication_error", 503: "service_unavailable_error"}

INTERNAL_ERROR = ErrorReply(
    500, ErrorDetail("The server failed; its log says why.", "server_error", None, "internal_error")
)
