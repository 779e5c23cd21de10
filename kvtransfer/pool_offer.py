"""Whether a peer reads our pool by itself: offered once, when it first matters."""

import asyncio
from collections.abc import Callable

from kvtransfer.wire import AgentMessage, OfferPool, PoolMapped

ANSWER_TIMEOUT_S = 5.0


class PoolOffer:
    """The sender's end; `exported` is None where there is nothing to offer.

    A peer that doesn't answer in time gets messages, and is waited for again the next time.
    """

    def __init__(
        self,
        exported: bytes | None,
        *,
        send_control: Callable[[AgentMessage], None],
        timeout_s: float,
    ) -> None:
        self._exported = exported
        self._send_control = send_control
        self._timeout_s = min(ANSWER_TIMEOUT_S, timeout_s)
        self._answer: asyncio.Future[bool] | None = None
        self._is_closed = False

    async def is_accepted(self) -> bool:
        if self._exported is None or self._is_closed:
            return False
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
            self._send_control(OfferPool(self._exported))
        if self._answer.done():
            return self._answer.result()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(self._answer)
        except TimeoutError:
            return False

    def on_answer(self, message: PoolMapped) -> None:
        self._settle(is_mapped=message.is_mapped)

    def close(self) -> None:
        self._is_closed = True
        self._settle(is_mapped=False)

    def _settle(self, *, is_mapped: bool) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(is_mapped)
