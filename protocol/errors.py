"""The exception tree that all of Tandem shares.

TandemError
├── StartupError          one sentence for the operator; the process exits with code 2
├── InvalidRequestError   the client's fault; names the field; HTTP 400
│   └── ContextLengthError
├── ModelNotFoundError    HTTP 404
├── OverloadedError       HTTP 429 with Retry-After
├── ServiceUnavailableError  no worker can take the request now; HTTP 503
├── WorkerLostError       a worker died with the request on it; another attempt may be made
├── UnreadableError       bytes of a peer or client that are no message of the awaited kind
├── ProtocolMismatchError   two processes speak different protocol versions
├── LayoutMismatchError   two workers' KV layouts differ; names both sides
└── TransferError         a KV transfer failed
    ├── TransferCancelledError
    └── TransferTimeoutError
"""


class TandemError(Exception):
    """Root of all errors that Tandem raises on purpose."""


class StartupError(TandemError):
    """A bad flag, file, port or device; its text is one sentence that says what to do."""


class InvalidRequestError(TandemError):
    """A request that can't be served as it is. `field` is the parameter's name on the wire."""

    def __init__(self, message: str, *, field: str | None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.code = code


class ContextLengthError(InvalidRequestError):
    """Prompt (plus requested output) is longer than the model's context."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message, field=field, code="context_length_exceeded")


class ModelNotFoundError(TandemError):
    """The request names a model that isn't served here."""

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{model}` does not exist.")
        self.model = model


class OverloadedError(TandemError):
    """The queue can't take the request now."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServiceUnavailableError(TandemError):
    """No worker that could serve the request is alive."""


class WorkerLostError(TandemError):
    """The worker that held the request died or left."""


class UnreadableError(TandemError):
    """Bytes from elsewhere that are no message, record or answer of the awaited kind."""


class ProtocolMismatchError(TandemError):
    """A peer speaks another protocol version."""


class LayoutMismatchError(TandemError):
    """Two workers can't exchange KV blocks, because their layouts differ."""


class TransferError(TandemError):
    """A KV transfer did not complete."""


class TransferCancelledError(TransferError):
    """The transfer was stopped by its sender or its receiver."""


class TransferTimeoutError(TransferError):
    """The transfer made no progress before its deadline."""
