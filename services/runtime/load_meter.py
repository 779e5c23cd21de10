"""What an engine thread tells about its load: counts of the moment and its own measured rates."""

from dataclasses import dataclass
from typing import Protocol

from engine.block_pool import BlockPool
from protocol.records import WorkerLoad

# A chunk smaller than this costs a step's fixed time rather than its tokens'.
MIN_PREFILL_TOKENS = 32
SMOOTHING = 0.2


class Scheduler(Protocol):
    """The counts that both schedulers keep."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def queued_tokens(self) -> int: ...


@dataclass(slots=True)
class LoadMeter:
    """Exponential averages over steps: prefill milliseconds a token, decode milliseconds a step."""

    prefill_ms_per_token: float | None = None
    decode_ms_per_step: float | None = None

    def observe_step(self, seconds: float, *, num_prefill_tokens: int, num_decoding: int) -> None:
        """A step that mixes both tells prefill's rate, less what its decoding usually takes."""
        step_ms = 1e3 * seconds
        if num_prefill_tokens == 0:
            self.decode_ms_per_step = _smooth(self.decode_ms_per_step, step_ms)
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
        )


def _smooth(average: float | None, value: float) -> float:
    return value if average is None else average + SMOOTHING * (value - average)
