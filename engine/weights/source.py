"""The two places that layers take their weights from: safetensors files and random numbers.

A layer takes each tensor once, when it's constructed, and packs it; no tensor of the checkpoint
outlives that, so a model is never in memory twice.
"""

import json
import logging
import os
import sys
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from protocol.errors import StartupError

logger = logging.getLogger(__name__)

# Old checkpoints carry rope's frequencies; some with tied embeddings carry the table twice.
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "lm_head.weight")


class WeightSource(Protocol):
    """Named tensors, converted to one dtype and device."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Raises StartupError if there is no such tensor or it has another shape."""
        ...


class SafetensorsWeights:
    """Tensors of a model directory's `*.safetensors`, read when taken; a context manager."""

    def __init__(
        self, model_dir: Path, dtype: torch.dtype, device: torch.device, *, progress: bool
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._model_dir = model_dir
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, Path] = {}
        paths = find_safetensors(model_dir)
        for path in paths:
            _read_ahead(path)
            file = _open(path, device)
            self._files[path.name] = file
            self._file_of.update(dict.fromkeys(file.keys(), path))
        # A body saved without its head has no "model." in front of its names.
        self._is_bare = "embed_tokens.weight" in self._file_of
        self._untaken = {name for name in self._file_of if not name.endswith(_NOT_WEIGHTS)}
        self._bar = tqdm(
            total=sum(path.stat().st_size for path in paths),
            desc="Loading weights",
            unit="B",
            unit_scale=True,
            disable=not progress,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._files.clear()
        if error is None and self._untaken:
            some = ", ".join(sorted(self._untaken)[:3])
            logger.warning(
                "%d tensors in %s belong to no layer of this architecture, for example %s.",
                len(self._untaken),
                self._model_dir,
                some,
            )

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self._is_bare:
            name = name.removeprefix("model.")
        path = self._file_of.get(name)
        if path is None:
            raise StartupError(f"The weights in {self._model_dir} have no tensor {name!r}.")
        tensor: Tensor = self._files[path.name].get_tensor(name)
        if tensor.shape != shape:
            raise StartupError(
                f"Tensor {name!r} in {path} has shape {tuple(tensor.shape)}, "
                f"config.json wants {shape}."
            )
        self._untaken.discard(name)
        self._bar.update(tensor.nbytes)
        return tensor.to(self.dtype)


class DummyWeights:
    """Small random numbers under any name, the same in each process, for benchmarks."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # Seeded by name: prefill and decode workers must agree, whatever order they load in.
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        if name.endswith("norm.weight"):
            return values.fill_(1.0)
        return values.normal_(std=0.02, generator=generator)


def find_safetensors(model_dir: Path) -> list[Path]:
    """The files of the checkpoint: those that its index names, else all `*.safetensors`.

    Raises StartupError if there are none or an indexed one is missing.
    """
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [model_dir / name for name in names]
    else:
        paths = sorted(model_dir.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.exists()]
    if missing or not paths:
        lacking = ", ".join(missing) or "*.safetensors"
        raise StartupError(f"The model directory {model_dir} lacks its weights ({lacking}).")
    return paths


def _open(path: Path, device: torch.device) -> Any:  # noqa: ANN401  (safetensors has no type for it)
    try:
        return safe_open(path, framework="pt", device=str(device))
    except SafetensorError as error:
        raise StartupError(f"{path} is not a readable safetensors file: {error}.") from error


def _read_ahead(path: Path) -> None:
    """Lets the kernel read the whole file in the background while tensors are being packed."""
    if sys.platform == "linux":
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        os.close(fd)
