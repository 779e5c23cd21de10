"""Settings of a transfer agent."""

from dataclasses import dataclass
from typing import Self

from kvtransfer.plan import MessageLimits

_DEVICE_MESSAGE_BYTES = 64 << 20
_MAX_IDLE_BUFFERS = 8


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """Defaults suit shared memory; `gather_below_bytes` is near the point of equal CPU cost."""

    max_message_bytes: int = 16 << 20
    window_bytes: int = 32 << 20
    """Bytes that one connection has under way at most; bounds how long a peer's loop is busy."""
    gather_below_bytes: int = 48 << 10
    """Runs shorter than this are copied together, longer ones go as they are."""
    gathered_message_bytes: int = 1 << 20
    stall_timeout_s: float = 10.0
    """A write that makes no progress for so long fails; a dead peer is noticed long before."""
    read_peers_pools: bool = True
    """Map a peer's pool and read it, where the region can."""
    verify_checksums: bool = False
    """For debugging: CRC-32 of each message, made by the sender, verified by the receiver."""

    @classmethod
    def for_device_memory(cls, *, verify_checksums: bool = False) -> Self:
        """Large messages and many under way, as two processes on one card take turns of about a
        millisecond. A window's worth of staging memory is taken at either end (256 MiB)."""
        return cls(
            max_message_bytes=_DEVICE_MESSAGE_BYTES,
            window_bytes=4 * _DEVICE_MESSAGE_BYTES,
            gather_below_bytes=_DEVICE_MESSAGE_BYTES,
            gathered_message_bytes=_DEVICE_MESSAGE_BYTES,
            verify_checksums=verify_checksums,
        )

    @property
    def max_idle_staging_buffers(self) -> int:
        """What one connection's window needs, within reason."""
        return max(1, min(_MAX_IDLE_BUFFERS, self.window_bytes // self.gathered_message_bytes))

    def limits(self, block_bytes: int) -> MessageLimits:
        return MessageLimits(
            direct=max(1, self.max_message_bytes // block_bytes),
            gather_below=max(1, -(-self.gather_below_bytes // block_bytes)),
            gathered=max(1, self.gathered_message_bytes // block_bytes),
        )
