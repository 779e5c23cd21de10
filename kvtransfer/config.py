"""Settings of a transfer agent."""

from dataclasses import dataclass
from typing import Self

from kvtransfer.plan import MessageLimits

_DEVICE_MESSAGE_BYTES = 32 << 20


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
    verify_checksums: bool = False
    """For debugging: CRC-32 of each message, made by the sender, verified by the receiver."""

    @classmethod
    def for_device_memory(cls, *, verify_checksums: bool = False) -> Self:
        """A message costs 30 µs whatever its size and copies on the device are nearly free, so
        everything up to a message's size travels together."""
        return cls(
            max_message_bytes=_DEVICE_MESSAGE_BYTES,
            window_bytes=4 * _DEVICE_MESSAGE_BYTES,
            gather_below_bytes=_DEVICE_MESSAGE_BYTES,
            gathered_message_bytes=_DEVICE_MESSAGE_BYTES,
            verify_checksums=verify_checksums,
        )

    def limits(self, block_bytes: int) -> MessageLimits:
        return MessageLimits(
            direct=max(1, self.max_message_bytes // block_bytes),
            gather_below=max(1, -(-self.gather_below_bytes // block_bytes)),
            gathered=max(1, self.gathered_message_bytes // block_bytes),
        )
