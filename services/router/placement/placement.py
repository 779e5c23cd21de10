"""Where a request runs, decided by one cost in milliseconds.

    cost(P, D) = queued prefill work at P
               + uncached tokens × ms/token(P)
               + exposed transfer P → D, that is behind the end of computing
               + what D's admission wait adds to these
               + the slowdown that this request causes the sequences of D

Local prefill on D is one more candidate: queue, tokens and rate are D's own, nothing is
transferred, and the slowdown grows by the whole prefill, which D's sequences stand still for. It
is charged for `min_decoding` sequences even on an idle D, because somebody is expected to be
decoding there by then; so a prompt goes to a prefill worker unless computing it takes less time
than handing it over, or D has more of it cached.

Pure arithmetic without I/O: the simulator runs this very function.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from protocol.ids import WorkerId
from services.router.placement.candidates import (
    DecodeCandidate,
    PlacementPolicy,
    PrefillCandidate,
    RequestFacts,
)

CandidateT = TypeVar("CandidateT")


class Cost(msgspec.Struct, frozen=True):
    """The terms of the formula, each in milliseconds."""

    prefill_queue_ms: float
    prefill_ms: float
    exposed_transfer_ms: float
    decode_wait_ms: float
    slowdown_ms: float

    @property
    def total_ms(self) -> float:
        return (
            self.prefill_queue_ms
            + self.prefill_ms
            + self.exposed_transfer_ms
            + self.decode_wait_ms
            + self.slowdown_ms
        )


class Option(msgspec.Struct, frozen=True):
    """One way to run the request; `prefill` None means local prefill on `decode`."""

    prefill: WorkerId | None
    decode: WorkerId
    num_cached_tokens: int
    cost: Cost


class Placement(msgspec.Struct, frozen=True):
    """The choice, and the best of both kinds for logs and metrics."""

    chosen: Option
    best_local: Option | None
    best_remote: Option | None


def place(
    request: RequestFacts,
    prefill: Sequence[PrefillCandidate],
    decode: Sequence[DecodeCandidate],
    policy: PlacementPolicy,
) -> Placement | None:
    """The cheapest option; None if there is none, because no decode worker is large enough."""
    pricing = _Pricing(request, prefill, decode, policy)
    local = remote = None
    if policy.local_prefill != "always":
        remote = pricing.cheapest_remote()
    if policy.local_prefill != "never" or remote is None:
        local = pricing.cheapest_local()
    if remote is None or (local is not None and local.cost.total_ms < remote.cost.total_ms):
        return None if local is None else Placement(local, local, remote)
    return Placement(remote, local, remote)


def options(
    request: RequestFacts,
    prefill: Sequence[PrefillCandidate],
    decode: Sequence[DecodeCandidate],
    policy: PlacementPolicy,
) -> Iterator[Option]:
    """Every possible option with its cost, whatever `policy.local_prefill` says."""
    pricing = _Pricing(request, prefill, decode, policy)
    for d in pricing.decode:
        yield pricing.local(d)
        for p in pricing.prefill:
            if p.worker.layout == d.worker.layout:
                yield pricing.remote(p, d)


@dataclass(slots=True)
class _PricedPrefill:
    worker: PrefillCandidate
    queue_ms: float
    compute_ms: float
    num_last_tokens: int  # of the chunk whose transfer nothing can hide

    @property
    def ready_ms(self) -> float:
        return self.queue_ms + self.compute_ms


@dataclass(slots=True)
class _PricedDecode:
    worker: DecodeCandidate
    queue_ms: float
    compute_ms: float
    wait_ms: float
    slowdown_ms: float
    local_slowdown_ms: float
    num_missing_tokens: int  # not cached here, to be transferred
    # Bounds for the search, whichever prefill worker it is: what comes on top of its `ready_ms`,
    # and the total if the prompt were computed at once.
    after_ready_ms: float = 0.0
    least_ms: float = 0.0


class _Pricing:
    """The terms that belong to one worker, computed once; pairs are priced from them."""

    def __init__(
        self,
        request: RequestFacts,
        prefill: Sequence[PrefillCandidate],
        decode: Sequence[DecodeCandidate],
        policy: PlacementPolicy,
    ) -> None:
        self._request = request
        self._policy = policy
        self._default_ms_per_token = _mean(
            [worker.ms_per_token for worker in (*prefill, *decode)], policy.prefill_ms_per_token
        )
        self._default_ms_per_step = _mean(
            [worker.ms_per_step for worker in decode], policy.decode_ms_per_step
        )
        self.prefill = [self._price_prefill(p) for p in _rotated(prefill, request.tie_breaker)]
        self.decode = [
            self._price_decode(d)
            for d in _rotated(decode, request.tie_breaker // max(len(prefill), 1))
            if not d.num_blocks or _num_blocks(request.num_tokens + 1, d.block_size) <= d.num_blocks
        ]

    def cheapest_local(self) -> Option | None:
        priced = [self.local(d) for d in self.decode]
        return min(priced, key=lambda option: option.cost.total_ms, default=None)

    def cheapest_remote(self) -> Option | None:
        """Goes through the pairs from the least possible cost upward, until none can be cheaper."""
        if not self.prefill or not self.decode:
            return None
        fastest = max(p.worker.line_rates.fastest for p in self.prefill)
        fastest = max(fastest, self._policy.gb_per_s)
        if not self._request.is_transferred:
            fastest = math.inf
        least_tokens = min(p.num_last_tokens for p in self.prefill)
        for d in self.decode:
            fixed_ms = d.slowdown_ms + self._policy.handoff_ms
            last_ms = _transfer_ms(min(d.num_missing_tokens, least_tokens), d.worker, fastest)
            all_ms = _transfer_ms(d.num_missing_tokens, d.worker, fastest)
            d.after_ready_ms = fixed_ms + last_ms
            d.least_ms = fixed_ms + d.wait_ms + all_ms
        senders = sorted(self.prefill, key=lambda p: p.ready_ms)
        receivers = sorted(self.decode, key=lambda d: d.after_ready_ms)
        least_ms = min(d.least_ms for d in receivers)
        best_ms, best = float("inf"), None
        for p in senders:
            ready_ms = p.ready_ms
            if max(ready_ms + receivers[0].after_ready_ms, least_ms) >= best_ms:
                break
            for d in receivers:
                if ready_ms + d.after_ready_ms >= best_ms:
                    break
                if d.least_ms < best_ms and p.worker.layout == d.worker.layout:
                    cost_ms = self._pair_ms(p, d)
                    if cost_ms < best_ms:
                        best_ms, best = cost_ms, (p, d)
        return None if best is None else self.remote(*best)

    def local(self, d: _PricedDecode) -> Option:
        cost = Cost(d.queue_ms, d.compute_ms, 0.0, d.wait_ms, d.local_slowdown_ms)
        return Option(None, d.worker.worker_id, d.worker.num_cached_tokens, cost)

    def remote(self, p: _PricedPrefill, d: _PricedDecode) -> Option:
        last_ms, all_ms = self._transfer(p, d)
        without_wait_ms = max(p.ready_ms + last_ms, p.queue_ms + all_ms)
        cost = Cost(
            prefill_queue_ms=p.queue_ms,
            prefill_ms=p.compute_ms,
            exposed_transfer_ms=self._policy.handoff_ms + without_wait_ms - p.ready_ms,
            decode_wait_ms=max(0.0, d.wait_ms + all_ms - without_wait_ms),
            slowdown_ms=d.slowdown_ms,
        )
        return Option(p.worker.worker_id, d.worker.worker_id, p.worker.num_cached_tokens, cost)

    def _pair_ms(self, p: _PricedPrefill, d: _PricedDecode) -> float:
        """The total of `remote`. The first block leaves when P has begun and D has room; the
        prompt is there when the line has carried all of it, at best a chunk behind its end."""
        last_ms, all_ms = self._transfer(p, d)
        arrival_ms = max(p.ready_ms + last_ms, max(p.queue_ms, d.wait_ms) + all_ms)
        return arrival_ms + self._policy.handoff_ms + d.slowdown_ms

    def _transfer(self, p: _PricedPrefill, d: _PricedDecode) -> tuple[float, float]:
        """Milliseconds for the last chunk and for all that D hasn't cached."""
        rate = math.inf
        if self._request.is_transferred:
            rate = p.worker.line_rates.by_worker.get(d.worker.worker_id, self._policy.gb_per_s)
        last_ms = _transfer_ms(min(d.num_missing_tokens, p.num_last_tokens), d.worker, rate)
        return last_ms, _transfer_ms(d.num_missing_tokens, d.worker, rate)

    def _price_prefill(self, worker: PrefillCandidate) -> _PricedPrefill:
        rate = _known(worker.ms_per_token, self._default_ms_per_token)
        # The last token is always computed: its logits are what prefill is for.
        num_uncached = max(1, self._request.num_tokens - worker.num_cached_tokens)
        return _PricedPrefill(
            worker,
            queue_ms=worker.num_queued_tokens * rate,
            compute_ms=num_uncached * rate,
            num_last_tokens=min(num_uncached, worker.max_num_batched_tokens),
        )

    def _price_decode(self, worker: DecodeCandidate) -> _PricedDecode:
        request, policy = self._request, self._policy
        rate = _known(worker.ms_per_token, self._default_ms_per_token)
        step_ms = _known(worker.ms_per_step, self._default_ms_per_step)
        growth_ms = _known(worker.ms_per_sequence, policy.step_growth * step_ms)
        num_uncached = max(1, request.num_tokens - worker.num_cached_tokens)
        num_others = min(worker.num_running + worker.num_waiting, worker.max_num_seqs)
        slowdown_ms = num_others * growth_ms * request.num_output_tokens
        compute_ms = num_uncached * rate
        return _PricedDecode(
            worker,
            queue_ms=worker.num_queued_tokens * rate,
            compute_ms=compute_ms,
            wait_ms=_num_ends_awaited(request, worker)
            * (request.num_output_tokens * step_ms / max(worker.num_running, 1)),
            slowdown_ms=slowdown_ms,
            local_slowdown_ms=slowdown_ms + max(num_others, policy.min_decoding) * compute_ms,
            num_missing_tokens=max(0, request.num_tokens - worker.num_cached_tokens),
        )


def _num_ends_awaited(request: RequestFacts, worker: DecodeCandidate) -> float:
    """How many of the worker's sequences have to end before there is room for this one."""
    num_slots_short = worker.num_running + worker.num_waiting + 1 - worker.max_num_seqs
    if not worker.num_blocks:
        return max(0.0, num_slots_short)
    num_needed = _num_blocks(request.num_tokens + 1, worker.block_size)
    num_needed -= worker.num_cached_tokens // worker.block_size
    num_blocks_short = num_needed - worker.num_free_blocks
    num_held = max(0, worker.num_blocks - worker.num_free_blocks)
    blocks_a_sequence = max(1.0, num_held / max(worker.num_running, 1))
    return max(0.0, num_slots_short, num_blocks_short / blocks_a_sequence)


def _transfer_ms(num_tokens: int, worker: DecodeCandidate, gb_per_s: float) -> float:
    return num_tokens * worker.token_bytes / (gb_per_s * 1e6)


def _num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def _known(measured: float | None, default: float) -> float:
    return default if measured is None else measured


def _mean(measured: Sequence[float | None], default: float) -> float:
    """What workers that haven't measured yet are taken for: the others' average."""
    values = [value for value in measured if value is not None]
    return sum(values) / len(values) if values else default


def _rotated(candidates: Sequence[CandidateT], by: int) -> list[CandidateT]:
    """Sorting is stable, so among equals the first wins: who that is changes with each request."""
    start = by % len(candidates) if candidates else 0
    return [*candidates[start:], *candidates[:start]]
