"""The two places that layers take their weights from: safetensors files and random numbers.

A layer takes each tensor once, when it's constructed, and packs it; no tensor of the checkpoint
outlives that, so a model is never in memory twice. What a layer keeps as one is read as one: each
tensor to its place in the whole.
"""

import json
import logging
import os
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from engine.weights.device_reader import DeviceReader, TensorPlace, read_places
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

    def take_stacked(self, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
        """Several tensors as one, in order along the first dimension. Raises as `take` does."""
        ...


class SafetensorsWeights:
    """Tensors of a model directory's `*.safetensors`, read when taken; a context manager.

    A GPU's are read by threads into the memory that they stay in; a CPU's are views of the mapped
    file where their type is the model's.
    """

    def __init__(
        self, model_dir: Path, dtype: torch.dtype, device: torch.device, *, progress: bool
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._model_dir = model_dir
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, Path] = {}
        self._places: dict[str, TensorPlace] = {}
        self._reader: DeviceReader | None = None
        paths = find_safetensors(model_dir)
        for path in paths:
            _read_ahead(path)
            file = _open(path)
            self._files[path.name] = file
            self._file_of.update(dict.fromkeys(file.keys(), path))
            if device.type == "cuda":
                self._places.update(read_places(path))
        if device.type == "cuda":
            self._reader = DeviceReader(device)
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
        if self._reader is not None:
            self._reader.close()
        if error is None and self._untaken:
            some = ", ".join(sorted(self._untaken)[:3])
            logger.warning(
                "%d tensors in %s belong to no layer of this architecture, for example %s.",
                len(self._untaken),
                self._model_dir,
                some,
            )

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self._reader is not None:
            return self.take_stacked({name: shape})
        return self._map(name, shape).to(self.dtype)

    def take_stacked(self, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
        whole, parts = _stack(shapes, self.dtype, self.device)
        if self._reader is None:
            for (name, shape), part in zip(shapes.items(), parts, strict=True):
                part.copy_(self._map(name, shape))
        else:
            places = [self._place(name, shape) for name, shape in shapes.items()]
            self._reader.fill(list(zip(places, parts, strict=True)), on_bytes=self._bar.update)
        return whole

    def _map(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The file's own memory."""
        name, path = self._find(name)
        tensor: Tensor = self._files[path.name].get_tensor(name)
        self._check(name, path, tensor.shape, shape)
        self._bar.update(tensor.nbytes)
        return tensor

    def _place(self, name: str, shape: tuple[int, ...]) -> TensorPlace:
        name, path = self._find(name)
        place = self._places[name]
        self._check(name, path, place.shape, shape)
        return place

    def _find(self, name: str) -> tuple[str, Path]:
        """The tensor's name in the checkpoint, and its file."""
        if self._is_bare:
            name = name.removeprefix("model.")
        path = self._file_of.get(name)
        if path is None:
            raise StartupError(f"The weights in {self._model_dir} have no tensor {name!r}.")
        return name, path

    def _check(
        self, name: str, path: Path, actual: tuple[int, ...], expected: tuple[int, ...]
    ) -> None:
        if actual != expected:
            raise StartupError(
                f"Tensor {name!r} in {path} has shape {tuple(actual)}, "
                f"config.json wants {expected}."
            )
        self._untaken.discard(name)


class DummyWeights:
    """Small random numbers under any name, the same in each process, for benchmarks."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.take_stacked({name: shape})

    def take_stacked(self, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
        whole, parts = _stack(shapes, self.dtype, self.device)
        for name, values in zip(shapes, parts, strict=True):
            # Seeded by name: prefill and decode workers must agree, whatever order they load in.
            generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
            if name.endswith("norm.weight"):
                values.fill_(1.0)
            else:
                values.normal_(std=0.02, generator=generator)
        return whole


def _stack(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Sequence[Tensor]]:
    """Memory for tensors one behind the other along the first dimension, and each one's part."""
    num_rows = [shape[0] for shape in shapes.values()]
    _, *row_shape = next(iter(shapes.values()))
    whole = torch.empty((sum(num_rows), *row_shape), dtype=dtype, device=device)
    return whole, whole.split(num_rows)


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


def _open(path: Path) -> Any:  # noqa: ANN401  (safetensors has no type for it)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise StartupError(f"{path} is not a readable safetensors file: {error}.") from error


def _read_ahead(path: Path) -> None:
    """Lets the kernel read the whole file in the background while tensors are being packed."""
    if sys.platform == "linux":
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        os.close(fd)
