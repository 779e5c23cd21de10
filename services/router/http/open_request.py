"""A request from its first wait to its last byte: who watches the client, who writes the log."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from protocol.errors import TandemError
from services.router.dispatch.admission import Admission
from services.router.dispatch.generation import Generation
from services.router.http.client import Client


class OpenRequest:
    """Aborts the generation when the client goes away, and reports it when it's over.

    A context manager around whatever waits for the generation or sends it. For a stream it's
    entered twice: until the first output is there, then by the response; `keep` says that it
    goes on.
    """

    def __init__(
        self,
        generation: Generation,
        admission: Admission,
        client: Client,
        *,
        on_end: Callable[[Generation], None],
    ) -> None:
        self.generation = generation
        self._admission = admission
        self._client = client
        self._on_end = on_end
        self._kept = False

    def __enter__(self) -> Self:
        self._kept = False
        self._client.listen(self._client_left)
        return self

    def keep(self) -> None:
        """The next exit isn't the end."""
        self._kept = True

    def fail(self, error: TandemError) -> None:
        """Ends it here and on the workers, in the queue too; the client gets `error`."""
        self.generation.failed(error)
        self._admission.leave()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._kept and error is None:
            return
        self._client.listen(None)
        if isinstance(error, TandemError):
            self.generation.failed(error)
        elif error is not None:
            self.generation.abort()
        self.generation.close()
        self._admission.leave()
        # Behind the answer's last byte, which needn't wait for it.
        asyncio.get_running_loop().call_soon(self._on_end, self.generation)

    def _client_left(self) -> None:
        self.generation.abort()
        self._admission.leave()
