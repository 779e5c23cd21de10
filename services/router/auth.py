"""Lets in who knows a key."""

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from services.router.http_errors import HttpError, error_reply

# Probes and scrapers have no key.
_GUARDED = ("/v1", "/tokenize", "/detokenize", "/load_config", "/reset_prefix_cache", "/abort")


class ApiKeyGuard:
    """ASGI middleware: 401 for guarded paths without `Authorization: Bearer <one of the keys>`."""

    def __init__(self, app: ASGIApp, *, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._refuses(scope):
            error = HttpError(
                401,
                "Give a valid API key as bearer token.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_reply(error).response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refuses(self, scope: Scope) -> bool:
        # A browser asks with OPTIONS, and without key, whether it may send one.
        if scope["method"] == "OPTIONS" or not scope["path"].startswith(_GUARDED):
            return False
        headers: dict[bytes, bytes] = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = _digest(key.strip())
        known = [hmac.compare_digest(digest, other) for other in self._digests]
        return scheme.lower() != b"bearer" or not any(known)


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys, so that comparing tells nothing about them."""
    return hashlib.sha256(key).digest()
