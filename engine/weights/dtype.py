"""Which floating point types a model runs in, and keeps its keys and values in."""

import functools
from pathlib import Path

import torch

from protocol.errors import StartupError

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_ALIASES = {"half": "float16", "float": "float32"}  # vLLM's
_KV_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# Linux's names for the instructions that multiply bfloat16 without widening it first.
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def resolve_dtype(name: str, device: torch.device, *, checkpoint_dtype: str) -> torch.dtype:
    """`--dtype`'s value, with "auto" decided.

    On a GPU "auto" is the checkpoint's own 16-bit type, or bfloat16; on a CPU it's bfloat16
    where that has instructions for it, else float32: emulated bfloat16 is slower than float32.
    """
    if name != "auto":
        return _DTYPES[_ALIASES.get(name, name)]
    if device.type == "cuda":
        return torch.float16 if checkpoint_dtype == "float16" else torch.bfloat16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def resolve_kv_dtype(
    name: str, *, model_dtype: torch.dtype, has_fp8_kv: bool = False
) -> torch.dtype:
    """`--kv-cache-dtype`'s value, with "auto" decided.

    That is fp8 for a checkpoint whose keys and values were calibrated for it (`has_fp8_kv`), else
    the model's type. Raises StartupError for another type of 16 bits than the model's.
    """
    if name == "auto":
        return torch.float8_e4m3fn if has_fp8_kv else model_dtype
    dtype = (_DTYPES | _KV_DTYPES)[name]
    if name in _DTYPES and dtype is not model_dtype:
        raise StartupError(
            f"--kv-cache-dtype {name} doesn't fit: the model runs in {_name(model_dtype)}, and "
            "keys and values are of its type or fp8."
        )
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 natively; False where it's unknown."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = [line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))]
    return bool(flags) and not _BFLOAT16_FLAGS.isdisjoint(flags[0].split())
