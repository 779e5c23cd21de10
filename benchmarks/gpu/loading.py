"""Times loading a checkpoint from safetensors to a GPU, beside what disk and bus can do.

    python -m benchmarks.gpu.loading [--layers 10] [--out benchmarks/results/gpu-loading.json]

Writes a synthetic checkpoint of Llama-3.1-8B's shape with fewer layers to a temporary directory.
"Cold" is with the files dropped from the page cache; some of them may be cached below it still.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.commit import current_commit
from benchmarks.gpu.llama_8b import LLAMA_8B
from engine.models.config import read_model_config
from engine.models.registry import build_model, load_model
from engine.weights.source import SafetensorsWeights, find_safetensors
from protocol.errors import StartupError

CUDA = torch.device("cuda")
NUM_SHARDS = 4
REPEATS = 3
GB = 1e9


class _Names:
    """A weight source that remembers what was asked of it."""

    dtype = torch.bfloat16
    device = torch.device("meta")

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.take_stacked({name: shape})

    def take_stacked(self, shapes: dict[str, tuple[int, ...]]) -> torch.Tensor:
        self.shapes |= shapes
        first, *rest = shapes.values()
        rows = first[0] + sum(shape[0] for shape in rest)
        return torch.empty((rows, *first[1:]), dtype=self.dtype, device=self.device)


def write_checkpoint(model_dir: Path, num_layers: int) -> int:
    """Random numbers in shards of several tensors each; the checkpoint's bytes."""
    shape = LLAMA_8B | {"num_hidden_layers": num_layers}
    (model_dir / "config.json").write_text(json.dumps(shape))
    names = _Names()
    build_model(read_model_config(model_dir), names)
    tensors = list(names.shapes.items())
    for shard in range(NUM_SHARDS):
        part = tensors[shard::NUM_SHARDS]
        path = model_dir / f"model-{shard}.safetensors"
        save_file(
            {
                name: torch.randn(shape, dtype=torch.bfloat16, device=CUDA).cpu()
                for name, shape in part
            },
            path,
        )
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return sum(path.stat().st_size for path in find_safetensors(model_dir))


def drop_from_page_cache(model_dir: Path) -> None:
    for path in find_safetensors(model_dir):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_plainly(model_dir: Path) -> None:
    """One thread, one buffer."""
    buffer = bytearray(8 << 20)
    for path in find_safetensors(model_dir):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load_by_safetensors(model_dir: Path) -> None:
    """Tensor by tensor with the library's own way to a device."""
    for path in find_safetensors(model_dir):
        with safe_open(path, framework="pt", device="cuda") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
            torch.cuda.synchronize()
            del tensors


def load(model_dir: Path, *, progress: bool = False) -> None:
    load_model(
        read_model_config(model_dir),
        model_dir,
        dtype=torch.bfloat16,
        device=CUDA,
        progress=progress,
    )
    torch.cuda.synchronize()


def timed(call: Callable[[], object], *, before: Callable[[], object] = lambda: None) -> float:
    """Seconds of the fastest of some calls."""
    times: list[float] = []
    for _ in range(REPEATS):
        before()
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def copy_gb_per_s() -> float:
    pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    into = torch.empty_like(pinned, device=CUDA)

    def copy() -> None:
        into.copy_(pinned, non_blocking=True)
        torch.cuda.synchronize()

    return pinned.nbytes / timed(copy) / GB


def peak_bytes(model_dir: Path) -> dict[str, int]:
    """What a load takes at most, on the device and of the process's own host memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    load(model_dir)
    return {
        "device": torch.cuda.max_memory_allocated(),
        "device_reserved": torch.cuda.max_memory_reserved(),
        "host_growth": _status_bytes("VmHWM") - before,
    }


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def check(model_dir: Path) -> None:
    """Raises StartupError unless every tensor is what the library reads."""
    with SafetensorsWeights(model_dir, torch.bfloat16, CUDA, progress=False) as weights:
        for path in find_safetensors(model_dir):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    expected = file.get_tensor(name)
                    actual = weights.take(name, tuple(expected.shape))
                    if not torch.equal(actual, expected.to(CUDA)):
                        raise StartupError(f"{name} was not read as it is.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=current_commit(), help="where the machine has no git")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "card": torch.cuda.get_device_name(),
        "cpus": os.cpu_count(),
        "pinned_copy_gb_per_s": copy_gb_per_s(),
    }
    with TemporaryDirectory() as name:
        model_dir = Path(name)
        num_bytes = write_checkpoint(model_dir, args.layers)
        results["checkpoint_bytes"] = num_bytes
        ways: dict[str, Callable[[Path], None]] = {
            "plain_read": read_plainly,
            "safetensors": load_by_safetensors,
            "load": load,
        }
        for way, call in ways.items():
            warm_s = timed(lambda call=call: call(model_dir))
            cold_s = timed(
                lambda call=call: call(model_dir), before=lambda: drop_from_page_cache(model_dir)
            )
            results[way] = {
                "warm_s": warm_s,
                "warm_gb_per_s": num_bytes / warm_s / GB,
                "cold_s": cold_s,
                "cold_gb_per_s": num_bytes / cold_s / GB,
            }
            print(way, results[way], flush=True)
        results["peak_bytes"] = peak_bytes(model_dir)
        check(model_dir)
    print(json.dumps(results, indent=1))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
