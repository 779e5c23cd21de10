"""The client of one request, as far as it concerns us: whether it's still there."""

from collections.abc import Callable, Mapping
from typing import Any

_EXTENSION = "tandem.client"


class Client:
    """Tells one listener when the client has gone, without a task that waits for ASGI to say it."""

    __slots__ = ("_is_gone", "_listener")

    def __init__(self) -> None:
        self._is_gone = False
        self._listener: Callable[[], None] | None = None

    @classmethod
    def of(cls, scope: Mapping[str, Any]) -> "Client":
        """Whose request it is; where nobody watches the connection, somebody who stays."""
        return scope.get("extensions", {}).get(_EXTENSION) or cls()

    def as_extension(self) -> dict[str, Any]:
        """The `extensions` of an ASGI scope."""
        return {_EXTENSION: self}

    def listen(self, listener: Callable[[], None] | None) -> None:
        """`listener` is called once: now, if the client has gone already. None ends it."""
        self._listener = listener
        if self._is_gone:
            self._tell()

    def left(self) -> None:
        self._is_gone = True
        self._tell()

    def _tell(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener()
