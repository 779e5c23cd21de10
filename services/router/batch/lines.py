"""A batch's lines: requests as they come in a file, results as they leave in one."""

import secrets
from collections.abc import Callable, Collection
from typing import Any, Literal

import msgspec

from protocol.decoding import decode
from protocol.errors import InvalidRequestError, ModelNotFoundError, UnreadableError
from services.router.batch.answer import Answer
from services.router.batch.records import BatchError
from services.router.http.body import invalid_value
from services.router.openai.api import CLIENT_CLOSED_REQUEST

# Of all that can be in a batch; which of them are there depends on the router's routes.
BATCH_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


class _BodyHead(msgspec.Struct):
    """The fields of a body that matter to its batch; the rest is the endpoint's business."""

    model: Any = None
    stream: Any = None
    background: Any = None
    priority: Any = None


class RequestLine(msgspec.Struct, kw_only=True):
    """OpenAI's form of a request in a file."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: Literal["POST"] = "POST"


_lines = msgspec.json.Decoder(RequestLine)
_heads = msgspec.json.Decoder(_BodyHead)


def parse_line(line: bytes) -> RequestLine:
    """Raises InvalidRequestError that names the field."""
    try:
        # Strings inside of the body would only be looked at when somebody decodes them.
        line.decode()
        parsed = decode(_lines, line)
    except (UnreadableError, UnicodeDecodeError) as error:
        if isinstance(error.__cause__, msgspec.ValidationError):
            raise invalid_value(str(error.__cause__)) from error
        raise InvalidRequestError(
            f"The line isn't valid JSON: {error}.", field=None, code="invalid_json_line"
        ) from error
    if not parsed.custom_id:
        raise InvalidRequestError("`custom_id` is empty.", field="custom_id")
    if not bytes(parsed.body).startswith(b"{"):
        raise InvalidRequestError("`body` must be an object.", field="body", code="invalid_type")
    # Slices of the line would keep all of it.
    return msgspec.structs.replace(parsed, body=parsed.body.copy())


class LineValidator:
    """Checks the lines of one file, one after the other.

    `check_model` raises ModelNotFoundError for a model that isn't served.
    """

    def __init__(
        self, urls: Collection[str], check_model: Callable[[str | None], str] | None
    ) -> None:
        self._urls = urls
        self._check_model = check_model
        self._seen: set[str] = set()

    @property
    def num_lines(self) -> int:
        """Good ones."""
        return len(self._seen)

    def check(self, line: bytes) -> RequestLine:
        """Raises InvalidRequestError or ModelNotFoundError."""
        parsed = parse_line(line)
        if parsed.custom_id in self._seen:
            raise InvalidRequestError(
                f"The `custom_id` {parsed.custom_id!r} is there twice.",
                field="custom_id",
                code="duplicate_custom_id",
            )
        if parsed.url not in self._urls:
            raise InvalidRequestError(
                f"`url` must be {' or '.join(self._urls)}.", field="url", code="invalid_url"
            )
        try:
            head = decode(_heads, parsed.body)
        except UnreadableError as error:
            # Numbers inside of the body are looked at only now.
            text = f"`body` can't be read: {error}."
            raise InvalidRequestError(text, field="body", code="invalid_json_line") from error
        if head.stream:
            raise InvalidRequestError("A request in a file can't be streamed.", field="body.stream")
        if head.background:
            text = "A request in a file runs in the background anyway."
            raise InvalidRequestError(text, field="body.background")
        if self._check_model is not None and isinstance(head.model, str):
            self._check_model(head.model)
        self._seen.add(parsed.custom_id)
        return parsed


def line_error(number: int, error: InvalidRequestError | ModelNotFoundError) -> BatchError:
    match error:
        case ModelNotFoundError():
            return BatchError("model_not_found", str(error), "body.model", number)
        case InvalidRequestError():
            return BatchError(error.code, error.message, error.field, number)


def model_in(line: RequestLine) -> str | None:
    model = _heads.decode(line.body).model
    return model if isinstance(model, str) else None


def with_priority(body: bytes, least: int) -> bytes:
    """The body with its priority at `least` or later; a bad one is left for the endpoint."""
    priority = _heads.decode(body).priority
    if priority is not None and (type(priority) is not int or priority >= least):
        return body
    inner = body.strip()[1:-1].strip()
    # Of two fields with one name the last counts.
    return b"{" + inner + (b"," if inner else b"") + b'"priority":%d}' % least


class LineResponse(msgspec.Struct, frozen=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class ResultLine(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's form of a result: a response of whatever status, or why there is none."""

    id: str
    custom_id: str
    response: LineResponse | None = None
    error: BatchError | None = None

    def encode(self) -> bytes:
        line = msgspec.json.encode(
            {
                "id": self.id,
                "custom_id": self.custom_id,
                "response": self.response,
                "error": None
                if self.error is None
                else {"code": self.error.code, "message": self.error.message},
            }
        )
        return line + b"\n"


def answered(custom_id: str, answer: Answer) -> ResultLine:
    """Errors of the API have no id of their own: the line's stands for it."""
    if answer.status == CLIENT_CLOSED_REQUEST:
        return unanswered(custom_id, "request_aborted", "The request was aborted.")
    line_id = _new_id()
    request_id = _read_answer(answer.body).id or line_id
    response = LineResponse(answer.status, request_id, msgspec.Raw(answer.body))
    return ResultLine(id=line_id, custom_id=custom_id, response=response)


def unanswered(custom_id: str, code: str, message: str) -> ResultLine:
    return ResultLine(id=_new_id(), custom_id=custom_id, error=BatchError(code, message))


def _new_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"


class _TokenDetails(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    """Of chat and completions, and of responses."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _TokenDetails | None = None
    input_tokens_details: _TokenDetails | None = None
    completion_tokens_details: _TokenDetails | None = None
    output_tokens_details: _TokenDetails | None = None


class _Answer(msgspec.Struct):
    id: str | None = None
    usage: _Usage | None = None


_answers = msgspec.json.Decoder(_Answer)


def _read_answer(body: bytes) -> _Answer:
    """Other servers may say nothing of this, or in another form."""
    try:
        return decode(_answers, body)
    except UnreadableError:
        return _Answer()


def tokens_used(body: bytes) -> dict[str, int]:
    """What a successful answer's usage adds to its batch's."""
    usage = _read_answer(body).usage or _Usage()
    nothing = _TokenDetails()
    read = usage.prompt_tokens_details or usage.input_tokens_details or nothing
    written = usage.completion_tokens_details or usage.output_tokens_details or nothing
    return {
        "input_tokens": usage.prompt_tokens + usage.input_tokens,
        "cached_tokens": read.cached_tokens or 0,
        "output_tokens": usage.completion_tokens + usage.output_tokens,
        "reasoning_tokens": written.reasoning_tokens or 0,
    }
