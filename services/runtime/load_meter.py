"""What an engine thread tells about its load: counts of the moment and its own measured rates."""

from dataclasses import dataclass, field
from typing import Protocol

from engine.block_pool import BlockPool
from protocol.records import WorkerLoad

# A chunk smaller than this costs a step's fixed time rather than its tokens'.
MIN_PREFILL_TOKENS = 32
SMOOTHING = 0.2
# The cost of a sequence changes slowly, and below this variance of their number noise would pass
# for it.
COST_SMOOTHING = 0.05
MIN_VARIANCE = 1.0


class Scheduler(Protocol):
    """The counts that both schedulers keep."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def queued_tokens(self) -> int: ...


@dataclass(slots=True)
class BatchCost:
    """What one more sequence adds to a decode step: the slope of a line through recent steps,
    exponentially weighted (West 1979, "Updating mean and variance estimates")."""

    _mean_sequences: float | None = None
    _mean_ms: float = 0.0
    _variance: float = 0.0
    _covariance: float = 0.0

    def observe(self, num_sequences: int, step_ms: float) -> None:
        if self._mean_sequences is None:
            self._mean_sequences, self._mean_ms = num_sequences, step_ms
            return
        off_sequences = num_sequences - self._mean_sequences
        off_ms = step_ms - self._mean_ms
        kept = 1.0 - COST_SMOOTHING
        self._mean_sequences += COST_SMOOTHING * off_sequences
        self._mean_ms += COST_SMOOTHING * off_ms
        self._variance = kept * (self._variance + COST_SMOOTHING * off_sequences**2)
        self._covariance = kept * (self._covariance + COST_SMOOTHING * off_sequences * off_ms)

    @property
    def ms_per_sequence(self) -> float | None:
        """None while the batch hasn't changed enough to tell."""
        if self._variance < MIN_VARIANCE:
            return None
        return max(0.0, self._covariance / self._variance)


@dataclass(slots=True)
class LoadMeter:
    """Exponential averages over steps: prefill milliseconds a token, decode milliseconds a step,
    and milliseconds by which a further sequence lengthens it (its last known value)."""

    prefill_ms_per_token: float | None = None
    decode_ms_per_step: float | None = None
    decode_ms_per_sequence: float | None = None
    _batch_cost: BatchCost = field(default_factory=BatchCost)

    def observe_step(self, seconds: float, *, num_prefill_tokens: int, num_decoding: int) -> None:
        """A step that mixes both tells prefill's rate, less what its decoding usually takes."""
        step_ms = 1e3 * seconds
        if num_prefill_tokens == 0:
            self.decode_ms_per_step = _smooth(self.decode_ms_per_step, step_ms)
            self._batch_cost.observe(num_decoding, step_ms)
            measured = self._batch_cost.ms_per_sequence
            if measured is not None:
                self.decode_ms_per_sequence = measured
        elif num_prefill_tokens >= MIN_PREFILL_TOKENS:
            if num_decoding:
                step_ms = max(step_ms - (self.decode_ms_per_step or 0.0), 0.1 * step_ms)
            self.prefill_ms_per_token = _smooth(
                self.prefill_ms_per_token, step_ms / num_prefill_tokens
            )

    def load(self, scheduler: Scheduler, pool: BlockPool) -> WorkerLoad:
        counts = pool.counts
        return WorkerLoad(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            queued_prefill_tokens=scheduler.queued_tokens,
            num_free_blocks=counts.free,
            num_referenced_blocks=counts.referenced,
            num_cached_blocks=counts.cached,
            num_quarantined_blocks=counts.quarantined,
            prefill_ms_per_token=self.prefill_ms_per_token,
            decode_ms_per_step=self.decode_ms_per_step,
            decode_ms_per_sequence=self.decode_ms_per_sequence,
        )


def _smooth(average: float | None, value: float) -> float:
    return value if average is None else average + SMOOTHING * (value - average)
