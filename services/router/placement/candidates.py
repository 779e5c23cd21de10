"""What placement knows of a request and of the workers that could take it; plain numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import msgspec

from protocol.ids import WorkerId

LocalPrefill: TypeAlias = Literal["auto", "never", "always"]


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """How local prefill is chosen, and what is assumed where nobody has measured yet.

    `local_prefill`: "auto" by cost; "never" while there is any prefill worker; "always".
    """

    local_prefill: LocalPrefill = "auto"
    min_decoding: float = 1.0
    handoff_ms: float = 1.0
    prefill_ms_per_token: float = 0.5
    decode_ms_per_step: float = 20.0
    step_growth: float = 0.05  # of a step's time, with each sequence more in the batch
    gb_per_s: float = 1.0


class RequestFacts(msgspec.Struct, frozen=True):
    """`num_tokens` are to be in the cache before decoding; `tie_breaker` spreads equal costs.
    Where prefill's token is the last one, nothing `is_transferred`."""

    num_tokens: int
    num_output_tokens: int
    tie_breaker: int = 0
    is_transferred: bool = True


@dataclass(frozen=True, slots=True)
class LineRates:
    """Measured GB/s (10^9 bytes) from one worker to others. Made once a load report, not once a
    request: `fastest` lets placement leave out most pairs without a look."""

    by_worker: Mapping[WorkerId, float] = field(default_factory=dict[WorkerId, float])
    fastest: float = 0.0

    @classmethod
    def of(cls, by_worker: Mapping[WorkerId, float]) -> "LineRates":
        return cls(by_worker, max(by_worker.values(), default=0.0))


NO_RATES = LineRates()


class PrefillCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """A prefill worker that takes work, with what was placed on it but isn't reported yet."""

    worker_id: WorkerId
    layout: str = ""
    num_cached_tokens: int = 0
    num_queued_tokens: int = 0
    max_num_batched_tokens: int = 2048
    ms_per_token: float | None = None
    line_rates: LineRates = NO_RATES


class DecodeCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """A decode worker that takes work. `num_free_blocks` counts evictable ones too; an encode
    worker is one that has no blocks and needs none."""

    worker_id: WorkerId
    num_blocks: int
    num_free_blocks: int
    layout: str = ""
    block_size: int = 16
    token_bytes: int = 0
    num_cached_tokens: int = 0
    num_queued_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    max_num_seqs: int = 256
    ms_per_token: float | None = None
    ms_per_step: float | None = None
    ms_per_sequence: float | None = None
