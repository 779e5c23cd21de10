"""Which GPU each worker of a stack runs on, and how much of its memory it may use."""

import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

VARIABLE = "CUDA_VISIBLE_DEVICES"
_COMMAND = ("nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits")
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class GpuPlace:
    """Where a worker runs, beside how many others; `gpu` is as `find_gpus` names it, None for
    whatever CUDA takes first."""

    gpu: str | None
    num_workers: int

    @property
    def environ(self) -> dict[str, str]:
        return {} if self.gpu is None else {VARIABLE: self.gpu}

    def memory_share(self, utilization: float) -> float:
        """The worker's, if all that run there use `utilization` of the GPU's memory together."""
        # Rounded down, so that all of them together never have more.
        return math.floor(utilization / self.num_workers * 1000) / 1000


def find_gpus(environ: Mapping[str, str]) -> list[str]:
    """As CUDA_VISIBLE_DEVICES takes them: those that it names, else all of the model that has the
    most memory, so that none is for a display. None without NVIDIA's driver."""
    if VARIABLE in environ:
        named = filter(None, map(str.strip, environ[VARIABLE].split(",")))
        # CUDA sees none behind one that isn't there.
        return [*takewhile("-1".__ne__, named)]
    try:
        found = subprocess.run(
            _COMMAND, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        ).stdout
        gpus = [tuple(map(str.strip, line.split(","))) for line in found.splitlines()]
        largest = max((int(memory), name) for _, name, memory in gpus)[1]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return [uuid for uuid, name, _ in gpus if name == largest]


def describe(places: Mapping[str, GpuPlace], gpus: Sequence[str]) -> str | None:
    """For people: which worker runs on which GPU, by its number; None where there is no choice."""
    where = [(worker, place.gpu) for worker, place in places.items() if place.gpu is not None]
    return ", ".join(f"{worker} on GPU {gpus.index(gpu)}" for worker, gpu in where) or None


def place(workers: Sequence[str], gpus: Sequence[str]) -> dict[str, GpuPlace]:
    """One worker a GPU, in turns, beginning anew if there are more workers."""
    if len(gpus) < 2:
        return {worker: GpuPlace(None, len(workers)) for worker in workers}
    chosen = {worker: gpus[index % len(gpus)] for index, worker in enumerate(workers)}
    counts = [*chosen.values()]
    return {worker: GpuPlace(gpu, counts.count(gpu)) for worker, gpu in chosen.items()}
