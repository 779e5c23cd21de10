"""Which blocks may be written, by whom, under which ticket.

    expect ──> open ──close──> closing ──no receive in flight──> gone
                 └────────── sender dropped ──────────────────────┘

A block is in at most one fence until that fence is gone, so a late write can't meet a new owner.
"""

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvtransfer.block_ids import BlockIds, to_block_ids
from kvtransfer.region import Run
from protocol.errors import TransferError
from protocol.ids import Incarnation, TicketId


@dataclass(eq=False)
class Fence:
    """One ticket's permission to write."""

    ticket_id: TicketId
    attempt: int
    sender_incarnation: Incarnation
    block_ids: frozenset[int]
    is_open: bool = True
    write_seqs: set[int] = field(default_factory=set[int])
    num_receiving: int = 0
    """Receives and reads into the blocks themselves, not completed; staged ones don't count."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def refusal_of_messages(self, messages_runs: Sequence[Sequence[Run]]) -> str | None:
        """Why messages may not write these runs of blocks; None if they may."""
        refusals = (self._refusal_of_runs(runs) for runs in messages_runs)
        return next((refusal for refusal in refusals if refusal is not None), None)

    def _refusal_of_runs(self, runs: Sequence[Run]) -> str | None:
        if not runs:
            return "a message without blocks was announced"
        for first, count in runs:
            if not 0 < count <= len(self.block_ids):
                return f"a run of {count} blocks does not fit ticket {self.ticket_id}"
            for block_id in range(first, first + count):
                if block_id not in self.block_ids:
                    return self._foreign(block_id)
        return None

    def _foreign(self, block_id: int) -> str:
        return f"block {block_id} is not part of ticket {self.ticket_id}"

    def refusal_of_blocks(self, block_ids: BlockIds) -> str | None:
        """The same for blocks that are read one by one."""
        # Numbers beyond the mask are taken for its last place, which is never ours.
        is_ours = self._mask.take(block_ids, mode="clip")
        if is_ours.all():
            return None
        return self._foreign(int(block_ids[np.argmin(is_ours)]))

    @functools.cached_property
    def _mask(self) -> NDArray[np.bool_]:
        """Of each block up to the one behind the last of ours: whether it's ours."""
        block_ids = to_block_ids(self.block_ids)
        mask = np.zeros(int(block_ids.max(initial=0)) + 2, dtype=np.bool_)
        mask[block_ids] = True
        return mask


class FenceTable:
    """All fences of a region."""

    def __init__(self) -> None:
        self._fences: dict[TicketId, Fence] = {}
        self._ticket_of_block: dict[int, TicketId] = {}

    def add(self, fence: Fence) -> None:
        """Raises TransferError if the ticket or one of its blocks is fenced already."""
        if fence.ticket_id in self._fences:
            raise TransferError(f"Ticket {fence.ticket_id} is open already.")
        for block_id in fence.block_ids:
            other = self._ticket_of_block.get(block_id)
            if other is not None:
                raise TransferError(
                    f"Block {block_id} of ticket {fence.ticket_id} belongs to ticket {other}."
                )
        self._fences[fence.ticket_id] = fence
        self._ticket_of_block.update(dict.fromkeys(fence.block_ids, fence.ticket_id))

    def get(self, ticket_id: TicketId) -> Fence | None:
        return self._fences.get(ticket_id)

    def of_sender(self, incarnation: Incarnation) -> list[Fence]:
        return [f for f in self._fences.values() if f.sender_incarnation == incarnation]

    def refusal(
        self, *, ticket_id: TicketId, attempt: int, sender_incarnation: Incarnation
    ) -> str | None:
        """Why this sender may not write under the ticket; None if it may."""
        fence = self._fences.get(ticket_id)
        if fence is None or not fence.is_open:
            return f"ticket {ticket_id} is not open"
        if attempt != fence.attempt:
            return f"ticket {ticket_id} is for attempt {fence.attempt}, not {attempt}"
        if sender_incarnation != fence.sender_incarnation:
            return f"ticket {ticket_id} is for another sender incarnation"
        return None

    def begin_receive(self, fence: Fence) -> None:
        assert fence.is_open
        fence.num_receiving += 1

    def end_receive(self, fence: Fence) -> None:
        fence.num_receiving -= 1
        if not fence.is_open and fence.num_receiving == 0:
            self._remove(fence)

    def close(self, fence: Fence) -> None:
        """From here on nothing is accepted; `fence.gone` tells when nothing is in flight."""
        fence.is_open = False
        if fence.num_receiving == 0:
            self._remove(fence)

    def abandon(self, fence: Fence) -> bool:
        """Ends the fence of a dropped sender; True if a receive was still in flight."""
        fence.is_open = False
        in_doubt = fence.num_receiving > 0
        self._remove(fence)
        return in_doubt

    def _remove(self, fence: Fence) -> None:
        if self._fences.get(fence.ticket_id) is not fence:
            return
        del self._fences[fence.ticket_id]
        for block_id in fence.block_ids:
            del self._ticket_of_block[block_id]
        fence.gone.set()
