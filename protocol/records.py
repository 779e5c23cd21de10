"""What workers publish about themselves: identity, load and the blocks they hold."""

from typing import TypeAlias

import msgspec

from protocol.block_hash import BlockHash
from protocol.ids import Incarnation, WorkerId, WorkerRef, WorkerRole
from protocol.layout import KVLayout


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Redis `worker:{id}`; fixed for one incarnation. An encode worker has no blocks."""

    protocol_version: int
    ref: WorkerRef
    role: WorkerRole
    model: str
    layout: KVLayout
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    metrics_address: str
    pid: int
    hostname: str


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's state a few times a second; the rates are its own measurements."""

    num_running: int = 0
    num_waiting: int = 0
    queued_prefill_tokens: int = 0
    num_free_blocks: int = 0
    num_referenced_blocks: int = 0
    num_cached_blocks: int = 0
    num_quarantined_blocks: int = 0
    prefill_ms_per_token: float | None = None
    decode_ms_per_step: float | None = None
    decode_ms_per_sequence: float | None = None  # by which one more of them lengthens a step
    transfer_gb_per_s: dict[WorkerId, float] = {}
    draining: bool = False


class BlocksStored(msgspec.Struct, frozen=True, tag="stored"):
    """Blocks that can be hit from now on, in chain order; `parent` precedes the first one."""

    parent: BlockHash
    hashes: list[BlockHash]


class BlocksRemoved(msgspec.Struct, frozen=True, tag="removed"):
    hashes: list[BlockHash]


class BlocksCleared(msgspec.Struct, frozen=True, tag="cleared"):
    pass


KVEvent: TypeAlias = BlocksStored | BlocksRemoved | BlocksCleared


class KVEventBatch(msgspec.Struct, frozen=True):
    """Entry `sequence` (0, 1, 2 …) of the event stream of one worker incarnation."""

    incarnation: Incarnation
    sequence: int
    events: list[KVEvent]
