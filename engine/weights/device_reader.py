"""Reads tensors from files straight into device memory, many pieces at a time.

A tensor is cut into chunks. A thread reads one into pinned memory and copies it to its place on
the device from there, on a stream of its own; while one copies, others read. That pinned memory is
all that loading takes on the host, and converting a chunk all it takes on the device.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from protocol.errors import StartupError

_CHUNK_BYTES = 8 << 20
_NUM_LANES = 12
_LENGTH_BYTES = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a safetensors file holds a tensor: `num_bytes` from byte `start` on."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_places(path: Path) -> dict[str, TensorPlace]:
    """By name; the file's header must be known to be sound.

    Raises StartupError for a type of numbers that no model is loaded from.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    places: dict[str, TensorPlace] = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise StartupError(f"Tensor {name!r} in {path} is of type {entry['dtype']}.")
        start, end = (_LENGTH_BYTES + header_bytes + offset for offset in entry["data_offsets"])
        places[name] = TensorPlace(
            path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start, end - start
        )
    return places


class DeviceReader:
    """Threads, pinned memory and open files; `close` gives all back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads = ThreadPoolExecutor(_NUM_LANES, "weight-reader")
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        for _ in range(_NUM_LANES):
            self._lanes.put(_Lane(device))
        self._fds: dict[Path, int] = {}

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def fill(
        self, parts: Sequence[tuple[TensorPlace, Tensor]], *, on_bytes: Callable[[int], object]
    ) -> None:
        """Each tensor, contiguous and on the device, gets what its place holds, converted.

        Done on return; `on_bytes` hears of the bytes read meanwhile. Raises StartupError if a file
        can't be read.
        """
        # Whatever was in the destinations' memory may still be in use on the caller's stream.
        is_free = torch.cuda.Event()
        is_free.record(torch.cuda.current_stream(self._device))
        chunks = [chunk for place, into in parts for chunk in _cut(place, into)]
        for num_bytes in self._threads.map(lambda chunk: self._copy(chunk, is_free), chunks):
            on_bytes(num_bytes)

    def _copy(self, chunk: "_Chunk", is_free: torch.cuda.Event) -> int:
        lane = self._lanes.get()
        try:
            lane.copy(chunk, self._fd(chunk.path), is_free)
        finally:
            self._lanes.put(lane)
        return chunk.num_bytes

    def _fd(self, path: Path) -> int:
        fd = self._fds.get(path)
        if fd is None:
            fd = os.open(path, os.O_RDONLY)
            if self._fds.setdefault(path, fd) != fd:
                os.close(fd)
        return self._fds[path]


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Bytes of a file and the elements, as many of them, that they go to."""

    path: Path
    start: int
    num_bytes: int
    dtype: torch.dtype
    into: Tensor


def _cut(place: TensorPlace, into: Tensor) -> Iterator[_Chunk]:
    flat = into.view(-1)
    for start in range(0, place.num_bytes, _CHUNK_BYTES):
        num_bytes = min(_CHUNK_BYTES, place.num_bytes - start)
        first, count = start // place.dtype.itemsize, num_bytes // place.dtype.itemsize
        yield _Chunk(
            place.path, place.start + start, num_bytes, place.dtype, flat[first : first + count]
        )


class _Lane:
    """What one chunk at a time is copied through."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        self._bytes = self._pinned.numpy().data
        self._stream = torch.cuda.Stream(device)

    def copy(self, chunk: _Chunk, fd: int, is_free: torch.cuda.Event) -> None:
        num_read = 0
        while num_read < chunk.num_bytes:
            rest = self._bytes[num_read : chunk.num_bytes]
            got = os.preadv(fd, [rest], chunk.start + num_read)
            if not got:
                raise StartupError(f"{chunk.path} ends before its tensors do.")
            num_read += got
        values = self._pinned[: chunk.num_bytes].view(chunk.dtype)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(is_free)
            if chunk.dtype is not chunk.into.dtype:
                # The device converts; torch alone would let the host do it.
                values = values.to(chunk.into.device, non_blocking=True)
            chunk.into.copy_(values, non_blocking=True)
        self._stream.synchronize()
