"""Asks all workers to forget their cached blocks, and waits for what they say."""

import asyncio
import secrets
from collections.abc import Sequence

from protocol.ids import WorkerId
from protocol.messages import PrefixCacheReset, ResetPrefixCache
from services.runtime.peers import Peer

# A worker answers between two steps.
ANSWER_DEADLINE_S = 10.0


class CacheResets:
    """The resets of one router that are under way. Everything happens in the event loop."""

    def __init__(self) -> None:
        self._waiting: dict[int, dict[Peer, asyncio.Future[int | None]]] = {}

    async def reset(
        self, peers: Sequence[Peer], *, deadline_s: float = ANSWER_DEADLINE_S
    ) -> dict[WorkerId, int | None]:
        """Number of blocks that each worker has dropped; None for one that didn't answer."""
        reset_id = secrets.randbits(62)
        loop = asyncio.get_running_loop()
        futures = {peer: loop.create_future() for peer in peers}
        self._waiting[reset_id] = futures
        try:
            for peer, future in futures.items():
                if not peer.send(ResetPrefixCache(reset_id)) and not future.done():
                    future.set_result(None)
            if futures:
                await asyncio.wait(futures.values(), timeout=deadline_s)
        finally:
            del self._waiting[reset_id]
        return {
            peer.peer_id: future.result() if future.done() else None
            for peer, future in futures.items()
        }

    def answered(self, peer: Peer, message: PrefixCacheReset) -> None:
        self._settle(message.reset_id, peer, message.num_dropped_blocks)

    def peer_lost(self, peer: Peer) -> None:
        for reset_id in self._waiting:
            self._settle(reset_id, peer, None)

    def _settle(self, reset_id: int, peer: Peer, num_blocks: int | None) -> None:
        future = self._waiting.get(reset_id, {}).get(peer)
        if future is not None and not future.done():
            future.set_result(num_blocks)
