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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from engine.models.quantization import Quantization
from engine.weights.device_reader import DeviceReader, TensorPlace, read_places
from protocol.errors import StartupError

logger = logging.getLogger(__name__)

# Old checkpoints carry the frequencies of rope or positions as numbers; some with tied embeddings
# carry the table twice, and BERT a pooler that was trained for something else.
_NOT_WEIGHTS = (
    "rotary_emb.inv_freq",
    "lm_head.weight",
    "embeddings.position_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a source has under a name."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """How linear layers hold their weights: quantized or not, and if so, whether they compute with
    them as they are. If not, weights are dequantized when they're loaded."""

    quantization: Quantization | None = None
    multiplies_fp8: bool = False


class WeightSource(Protocol):
    """Named tensors, converted to one dtype and device."""

    @property
    def linear_format(self) -> LinearFormat: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def stored(self, name: str) -> StoredTensor | None:
        """What there is under a name, if anything."""
        ...

    def take(
        self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """In the source's dtype unless another is asked for.

        Raises StartupError if there is no such tensor, it has another shape, or it is quantized and
        was not asked for as it is.
        """
        ...

    def take_stacked(
        self, shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Several tensors as one, in order along the first dimension. Raises as `take` does."""
        ...


class SafetensorsWeights:
    """Tensors of a model directory's `*.safetensors`, read when taken; a context manager.

    A GPU's are read by threads into the memory that they stay in; a CPU's are views of the mapped
    file where their type is the model's.
    """

    def __init__(
        self,
        model_dir: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        linear_format: LinearFormat = LinearFormat(),
        progress: bool,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.linear_format = linear_format
        self._model_dir = model_dir
        self._files: dict[str, Any] = {}
        self._places: dict[str, TensorPlace] = {}
        self._reader: DeviceReader | None = None
        paths = find_safetensors(model_dir)
        for path in paths:
            _read_ahead(path)
            self._files[path.name] = _open(path)
            self._places.update(read_places(path))
        if device.type == "cuda":
            self._reader = DeviceReader(device)
        # A body saved without its head has no "model." in front of its names.
        self._is_bare = "embed_tokens.weight" in self._places
        self._untaken = {name for name in self._places if not name.endswith(_NOT_WEIGHTS)}
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

    def stored(self, name: str) -> StoredTensor | None:
        place = self._places.get(self._stored_name(name))
        return None if place is None else StoredTensor(place.dtype, place.shape)

    def take(
        self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or self.dtype
        if self._reader is not None:
            return self.take_stacked({name: shape}, dtype=dtype)
        return self._map(name, self._place(name, shape, dtype)).to(dtype)

    def take_stacked(
        self, shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = dtype or self.dtype
        whole, parts = _stack(shapes, dtype, self.device)
        places = {name: self._place(name, shape, dtype) for name, shape in shapes.items()}
        if self._reader is None:
            for (name, place), part in zip(places.items(), parts, strict=True):
                part.copy_(self._map(name, place))
        else:
            filled = list(zip(places.values(), parts, strict=True))
            self._reader.fill(filled, on_bytes=self._bar.update)
        return whole

    def _map(self, name: str, place: TensorPlace) -> Tensor:
        """The file's own memory."""
        file = self._files[place.path.name]
        tensor: Tensor = file.get_tensor(self._stored_name(name))
        self._bar.update(tensor.nbytes)
        return tensor

    def _place(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorPlace:
        """Where the tensor is, which counts as taken now."""
        name = self._stored_name(name)
        place = self._places.get(name)
        if place is None:
            raise StartupError(f"The weights in {self._model_dir} have no tensor {name!r}.")
        if place.shape != shape:
            raise StartupError(
                f"Tensor {name!r} in {place.path} has shape {place.shape}, "
                f"config.json wants {shape}."
            )
        if place.dtype.itemsize == 1 and place.dtype is not dtype:
            raise StartupError(
                f"Tensor {name!r} in {place.path} is of type {place.dtype}, which needs a "
                "quantization_config in config.json that says so, and scales."
            )
        self._untaken.discard(name)
        return place

    def _stored_name(self, name: str) -> str:
        return name.removeprefix("model.") if self._is_bare else name


class DummyWeights:
    """Small random numbers under any name, the same in each process, for benchmarks."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        *,
        linear_format: LinearFormat = LinearFormat(),
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.linear_format = linear_format

    def stored(self, name: str) -> StoredTensor | None:  # noqa: ARG002  (as the protocol has it)
        """Nothing is: random weights are made as they are asked for."""
        return None

    def take(
        self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.take_stacked({name: shape}, dtype=dtype)

    def take_stacked(
        self, shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype | None = None
    ) -> Tensor:
        whole, parts = _stack(shapes, dtype or self.dtype, self.device)
        for name, values in zip(shapes, parts, strict=True):
            # Seeded by name: prefill and decode workers must agree, whatever order they load in.
            generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
            if name.lower().endswith("norm.weight"):
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
