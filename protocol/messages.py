"""The control plane: every message that two processes exchange over ZMQ.

A connection opens with `Hello` both ways; a peer with another `PROTOCOL_VERSION` is refused.
Who sends what:

    router  -> prefill   RunPrefill, AbortRequest, ResetPrefixCache
    router  -> decode    ExpectRequest, RunLocal, AbortRequest, ResetPrefixCache
    router  -> encode    RunLocal, AbortRequest, ResetPrefixCache
    worker  -> router    StepOutputs, RequestFailed, LoadReport, PrefixCacheReset
    prefill -> decode    ConnectKV, ReserveBlocks, PrefillDone, PrefillFailed, TransferStopped,
                         RenewTickets
    decode  -> prefill   KVConnected, GrantTicket, CancelTransfer
    all     -> all       Hello, Heartbeat, Goodbye
"""

from typing import TypeAlias

import msgspec

from protocol.ids import Incarnation, RequestKey, TicketId, WorkerRef
from protocol.layout import KVLayout
from protocol.records import WorkerLoad
from protocol.request import PhaseTimings, Request, SequenceOutput
from protocol.ticket import TransferTicket

PROTOCOL_VERSION = 3


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message on a connection. `peer_id` is a worker's or router's id."""

    protocol_version: int
    peer_id: str
    incarnation: Incarnation


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Says that the sender's event loop lives; sent a few times a second while connected."""


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    """The sender leaves on purpose; what it still owed the receiver is void."""


class RunPrefill(msgspec.Struct, frozen=True, tag="run_prefill"):
    """Compute the prompt's KV, push it to `decode`, and sample the first token.

    Without `decode` nothing is pushed: the first token is the last one.
    """

    request: Request
    decode: WorkerRef | None


class ExpectRequest(msgspec.Struct, frozen=True, tag="expect_request"):
    """`prefill` will ask for room for this request's KV; generate once it has arrived."""

    request: Request
    prefill: WorkerRef


class RunLocal(msgspec.Struct, frozen=True, tag="run_local"):
    """Prefill and decode on this worker alone, or encode."""

    request: Request


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    """Stop and free at once. Unknown keys are ignored: aborts race with completion."""

    key: RequestKey


class StepOutputs(msgspec.Struct, frozen=True, tag="outputs"):
    """All new tokens that one engine step made for one router's requests."""

    outputs: list[SequenceOutput]


class RequestFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The worker gave the request up; `retryable` if another attempt elsewhere can succeed.

    `field` is the sampling parameter that is to blame, if one is.
    """

    key: RequestKey
    message: str
    retryable: bool
    field: str | None = None


class LoadReport(msgspec.Struct, frozen=True, tag="load"):
    load: WorkerLoad


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_cache"):
    """Forget all cached blocks; the answer is a `PrefixCacheReset`. Those in use stay in use, but
    nobody finds them any more. `reset_id` is the router's, and no other router's."""

    reset_id: int


class PrefixCacheReset(msgspec.Struct, frozen=True, tag="cache_reset"):
    """`num_dropped_blocks` blocks that nobody used are free now."""

    reset_id: int
    num_dropped_blocks: int


class ConnectKV(msgspec.Struct, frozen=True, tag="connect_kv"):
    """Prefill's transfer agent introduces itself; `agent` is the transport's own metadata."""

    sender: WorkerRef
    layout: KVLayout
    agent: bytes


class KVConnected(msgspec.Struct, frozen=True, tag="kv_connected"):
    """Decode's answer to `ConnectKV`; `error` says why not, in words for the operator."""

    agent: bytes
    error: str | None = None


class ReserveBlocks(msgspec.Struct, frozen=True, tag="reserve_blocks"):
    """Prefill starts on the request and wants room; the answer is a `GrantTicket`, in time."""

    key: RequestKey
    num_tokens: int


class GrantTicket(msgspec.Struct, frozen=True, tag="ticket"):
    ticket: TransferTicket


class RenewTickets(msgspec.Struct, frozen=True, tag="renew"):
    """These tickets are still being worked on; their leases start anew."""

    ticket_ids: list[TicketId]


class PrefillDone(msgspec.Struct, frozen=True, tag="prefill_done"):
    """All `num_writes` writes under the ticket are sent; decode goes on behind `first`.

    `first` carries what the first token's output carried to the router, so that decode can
    continue penalties, counts and the stream position.
    """

    key: RequestKey
    ticket_id: TicketId
    num_writes: int
    first: SequenceOutput
    timings: PhaseTimings


class PrefillFailed(msgspec.Struct, frozen=True, tag="prefill_failed"):
    """Prefill gave the request up; decode forgets it (its transfer is stopped already)."""

    key: RequestKey
    message: str


class CancelTransfer(msgspec.Struct, frozen=True, tag="cancel_transfer"):
    """Decode doesn't want the request any more; answer with `TransferStopped`."""

    key: RequestKey
    ticket_id: TicketId | None


class TransferStopped(msgspec.Struct, frozen=True, tag="transfer_stopped"):
    """No write under this ticket is in flight or will start: its blocks may leave quarantine."""

    key: RequestKey
    ticket_id: TicketId


ControlMessage: TypeAlias = (
    Hello
    | Heartbeat
    | Goodbye
    | RunPrefill
    | ExpectRequest
    | RunLocal
    | AbortRequest
    | StepOutputs
    | RequestFailed
    | LoadReport
    | ResetPrefixCache
    | PrefixCacheReset
    | ConnectKV
    | KVConnected
    | ReserveBlocks
    | GrantTicket
    | RenewTickets
    | PrefillDone
    | PrefillFailed
    | CancelTransfer
    | TransferStopped
)
