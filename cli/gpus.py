"""Which GPU each worker of a stack runs on, and how much of its memory it may use."""

import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

VARIABLE = "CUDA_VISIBLE_DEVICES"
_COMMAND = (
    "nvidia-smi",
    "--query-gpu=index,uuid,memory.total,mig.mode.current",
    "--format=csv,noheader,nounits",
)
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """`name` is one that `CUDA_VISIBLE_DEVICES` takes, `label` what people know it by."""

    name: str
    label: str


@dataclass(frozen=True, slots=True)
class GpuPlace:
    """Where a worker runs, and how many do there with it; on whatever CUDA takes first if `gpu` is
    None."""

    gpu: Gpu | None
    num_workers: int

    @property
    def environ(self) -> dict[str, str]:
        return {} if self.gpu is None else {VARIABLE: self.gpu.name}

    def memory_share(self, utilization: float) -> float:
        """The worker's, if all that run there use `utilization` of the GPU's memory together."""
        # Rounded down, so that all of them together never have more.
        return math.floor(utilization / self.num_workers * 1000) / 1000


@dataclass(frozen=True, slots=True)
class _Listed:
    """A GPU as the driver's program lists it."""

    index: str
    uuid: str
    memory_mib: int
    is_divided: bool


def find_gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, else all with at least half of the largest one's
    memory, so that none is for a display. None without NVIDIA's driver, or where instances (MIG)
    divide GPUs and nobody has named any."""
    listed = _list_gpus()
    if VARIABLE in environ:
        return _named(environ[VARIABLE], listed)
    if any(gpu.is_divided for gpu in listed):
        return []
    least_mib = max((gpu.memory_mib for gpu in listed), default=0) / 2
    return [Gpu(gpu.uuid, gpu.index) for gpu in listed if gpu.memory_mib >= least_mib]


def place(workers: Sequence[str], gpus: Sequence[Gpu]) -> dict[str, GpuPlace]:
    """One worker a GPU, in turns, beginning anew if there are more workers."""
    if len(gpus) < 2:
        return {worker: GpuPlace(None, len(workers)) for worker in workers}
    chosen = {worker: gpus[index % len(gpus)] for index, worker in enumerate(workers)}
    counts = [*chosen.values()]
    return {worker: GpuPlace(gpu, counts.count(gpu)) for worker, gpu in chosen.items()}


def describe(places: Mapping[str, GpuPlace]) -> str | None:
    """For people: which worker runs on which GPU; None where there is no choice."""
    where = [(worker, place.gpu) for worker, place in places.items() if place.gpu is not None]
    return ", ".join(f"{worker} on GPU {gpu.label}" for worker, gpu in where) or None


def _list_gpus() -> list[_Listed]:
    try:
        found = subprocess.run(
            _COMMAND, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        ).stdout
        rows = [map(str.strip, line.split(",")) for line in found.splitlines()]
        return [
            _Listed(index, uuid, int(memory), mode == "Enabled")
            for index, uuid, memory, mode in rows
        ]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def _named(names: str, listed: Sequence[_Listed]) -> list[Gpu]:
    """Up to the first that isn't there, as CUDA has it."""
    there = takewhile(lambda name: _is_there(name, listed), map(str.strip, names.split(",")))
    return [Gpu(name, name) for name in there]


def _is_there(name: str, listed: Sequence[_Listed]) -> bool:
    """By its number or the beginning of its UUID; instances, which aren't listed, are taken on
    trust."""
    if name.isdecimal():
        return int(name) < len(listed)
    if name.startswith("MIG-"):
        return True
    return name.startswith("GPU-") and any(gpu.uuid.startswith(name) for gpu in listed)
