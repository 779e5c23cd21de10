"""Writes a Hugging Face directory from a GGUF file: config, tokenizer and bfloat16 weights.

Quantized tensors are dequantized once, here; numpy does it, so a router without torch can import.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from engine.weights.gguf_config import GgufArchitecture, Metadata, hf_config, read_architecture
from engine.weights.gguf_tokenizer import write_tokenizer
from protocol.errors import StartupError


def import_gguf(path: Path, target: Path, *, progress: bool) -> None:
    """Fill the empty directory `target`; raises StartupError for what isn't supported."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError) as error:
        raise StartupError(f"{path} is not a readable GGUF file: {error}.") from error
    metadata = Metadata((name, field.contents()) for name, field in reader.fields.items())
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = read_architecture(metadata)
    config = hf_config(architecture, metadata, tensors)
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", _generation_config(config))
    write_tokenizer(metadata, target)
    weights = {
        name: tensor
        for tensor in reader.tensors
        if (name := architecture.hf_name(tensor.name)) is not None
    }
    bar = tqdm(
        total=sum(int(tensor.n_bytes) for tensor in weights.values()),
        desc=f"Importing {path.stem}",
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
    with bar:
        _write_safetensors(
            target / "model.safetensors",
            {name: tuple(int(n) for n in reversed(t.shape)) for name, t in weights.items()},
            _dequantized(weights, architecture, config, bar),
        )


def _dequantized(
    weights: dict[str, gguf.ReaderTensor],
    architecture: GgufArchitecture,
    config: dict[str, Any],
    bar: "tqdm[Any]",
) -> Iterator[NDArray[np.float32]]:
    for name, tensor in weights.items():
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise StartupError(
                f"The GGUF file's tensor {tensor.name!r} is of type {tensor.tensor_type.name}, "
                "which can't be imported."
            ) from error
        values = values.astype(np.float32, copy=False)
        num_heads = architecture.permuted_heads(name, config)
        yield values if num_heads is None else _unpermute(values, num_heads)
        bar.update(int(tensor.n_bytes))


def _unpermute(values: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of q or k from llama.cpp's interleaved rotary pairs back to halves."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterable[NDArray[np.float32]]
) -> None:
    """One bfloat16 file, tensor by tensor, so that a model larger than memory can be imported.

    Format: 8 bytes with the header's length, a JSON header, the tensors' bytes one after another.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for values in tensors:
            file.write(_bfloat16(values).tobytes())


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of the float32 words, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: config[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(name) is not None
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
