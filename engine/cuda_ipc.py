"""Memory of one process of a CUDA device, mapped into another process of the same host: on the same
device, or on one that reaches it as a peer (NVLink), whether or not either process sees both.

By the driver's own calls, since torch shares tensors only together with files that count users.
The driver keeps exported memory until the last mapping is gone, also if its owner dies first.
"""

import ctypes
import functools

_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("data", ctypes.c_ubyte * 64),)


def export_memory(address: int) -> tuple[bytes, int]:
    """A handle of the allocation around `address`, and the address's offset in it.

    Raises OSError if its allocator's memory can't be shared. The device's context must be current.
    """
    base, _ = _range_around(address)
    handle = _Handle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), _address(base))
    return bytes(handle.data), address - base


def map_memory(handle: bytes) -> tuple[int, int]:
    """Where another process's allocation lies in this one, and how many bytes it really has.

    Raises OSError.
    """
    address = ctypes.c_uint64()
    _call(
        "cuIpcOpenMemHandle_v2",
        ctypes.byref(address),
        _Handle.from_buffer_copy(handle),
        ctypes.c_uint(_LAZY_PEER_ACCESS),
    )
    try:
        base, num_bytes = _range_around(address.value)
    except OSError:
        unmap_memory(address.value)
        raise
    return address.value, base + num_bytes - address.value


def unmap_memory(address: int) -> None:
    """Nothing on the device may use the mapping any more."""
    _call("cuIpcCloseMemHandle", _address(address))


def _range_around(address: int) -> tuple[int, int]:
    """The start of the allocation that has this address, and its bytes."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), _address(address))
    return base.value, size.value


def _address(address: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(address)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    status: int = getattr(_driver(), name)(*arguments)
    if status != 0:
        raise OSError(f"{name} failed with CUDA error {status}")
