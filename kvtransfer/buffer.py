"""What a message is sent from or received into: host memory, or memory of a CUDA device."""

from collections.abc import Sequence
from typing import Any, Protocol, Self, TypeAlias


class DeviceBuffer(Protocol):
    """Contiguous bytes on a device; transports read the address off `__cuda_array_interface__`.

    `gather` and `scatter` copy between it and runs of blocks (first, count) of the pool that it was
    made for, one behind the other from its start, and have copied when they return.
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

    def __getitem__(self, piece: slice, /) -> Self:
        """A part of the same memory."""
        ...

    def gather(self, runs: Sequence[tuple[int, int]]) -> None: ...

    def scatter(self, runs: Sequence[tuple[int, int]]) -> None: ...


Buffer: TypeAlias = memoryview | DeviceBuffer
