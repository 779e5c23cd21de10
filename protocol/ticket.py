"""Permission to write one request's KV blocks into a decode worker's pool."""

import msgspec

from protocol.ids import Incarnation, RequestKey, TicketId


class TransferTicket(msgspec.Struct, frozen=True, kw_only=True):
    """Decode's answer to `ReserveBlocks`.

    The prompt's first `num_cached_blocks` blocks are on the decode worker already; block
    `num_cached_blocks + i` of the prompt goes to the pool's block `block_ids[i]`.
    The ticket is valid for writes of `key.attempt`, to `incarnation`, until `ttl_s` pass without
    progress or a `RenewTickets`.
    """

    ticket_id: TicketId
    key: RequestKey
    incarnation: Incarnation
    num_cached_blocks: int
    block_ids: list[int]
    ttl_s: float
