"""Lets in who knows a key."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from protocol.errors import StartupError
from services.router.http.errors import HttpError, error_reply

# Probes and scrapers have no key.
_GUARDED = (
    *("/v1", "/v2", "/score", "/rerank", "/tokenize", "/detokenize"),
    *("/load_config", "/reset_prefix_cache", "/abort"),
)


def is_guarded(path: str) -> bool:
    return path.startswith(_GUARDED)


class ApiKeyGuard:
    """ASGI middleware: 401 for guarded paths without one of the keys.

    It comes as `Authorization: Bearer …`, or as `X-API-Key: …`, which Anthropic's clients send.
    """

    def __init__(self, app: ASGIApp, *, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._refuses(scope):
            error = HttpError(
                401,
                "Give a valid API key as bearer token or in X-API-Key.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_reply(error).response_at(scope["path"])(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refuses(self, scope: Scope) -> bool:
        # A browser asks with OPTIONS, and without key, whether it may send one.
        if scope["method"] == "OPTIONS" or not is_guarded(scope["path"]):
            return False
        headers: dict[bytes, bytes] = dict(scope["headers"])
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = [token.strip()] if scheme.lower() == b"bearer" else []
        if b"x-api-key" in headers:
            given.append(headers[b"x-api-key"])
        digests = [_digest(key) for key in given]
        known = [hmac.compare_digest(d, other) for d in digests for other in self._digests]
        return not any(known)


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that comparing tells nothing about them."""
    return hashlib.sha256(key).digest()


def keys_in_file(name: str | None) -> tuple[str, ...]:
    """The keys of a file with one a line; none without a file. Raises StartupError."""
    if name is None:
        return ()
    try:
        lines = Path(name).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"--api-key-file {name} can't be read: {error}.") from error
    if not lines:
        # An empty secret must not open the door.
        raise StartupError(f"--api-key-file {name} holds no key.")
    return tuple(lines)
