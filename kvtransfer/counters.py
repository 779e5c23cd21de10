"""What was transferred to and from one peer, for metrics and placement."""

from dataclasses import dataclass

_EWMA_WEIGHT = 0.2
_MIN_BYTES_FOR_RATE = 1 << 20


@dataclass(slots=True)
class DirectionCounters:
    """Totals of one direction; `seconds` is the sum of the writes' durations."""

    num_bytes: int = 0
    num_writes: int = 0
    seconds: float = 0.0
    gb_per_s: float | None = None
    """Moving average over writes long enough to tell; 10⁹ bytes a second."""

    def add(self, num_bytes: int, seconds: float) -> None:
        self.num_bytes += num_bytes
        self.num_writes += 1
        self.seconds += seconds
        if num_bytes >= _MIN_BYTES_FOR_RATE and seconds > 0.0:
            self.observe_rate(num_bytes / seconds / 1e9)

    def observe_rate(self, gb_per_s: float) -> None:
        """Takes a rate into the average, also one measured without a write."""
        if self.gb_per_s is None:
            self.gb_per_s = gb_per_s
        else:
            self.gb_per_s += _EWMA_WEIGHT * (gb_per_s - self.gb_per_s)


@dataclass(slots=True)
class PeerCounters:
    """Both directions of one connection."""

    sent: DirectionCounters
    received: DirectionCounters
