"""How a checkpoint's linear weights are stored in 8 bits, read from config.json without torch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from protocol.errors import StartupError

Activations = Literal["dynamic", "static", "none"]

_PATTERN_PREFIX = "re:"
_BLOCK = (128, 128)
_SERVED = "served are unquantized weights, and weights in fp8 (e4m3)"


@dataclass(frozen=True, slots=True)
class Quantization:
    """Linear weights are fp8; the head, the embedding and the norms keep their type.

    `activations` says where the scales of a layer's inputs come from: "dynamic" ones are made for
    each token, "static" ones are the checkpoint's, with "none" inputs stay as they are. `is_stored`
    tells fp8 weights in the checkpoint from ones that are made while it's loaded. `block` is the
    part of a weight, in rows and columns, that shares a scale where scales are stored as matrices.
    `has_fp8_kv` tells that keys and values were calibrated for 8 bits, too. `ignored` are layers
    that aren't quantized while loading, by what `matches` takes.
    """

    method: str
    activations: Activations = "dynamic"
    is_stored: bool = True
    block: tuple[int, int] = _BLOCK
    has_fp8_kv: bool = False
    ignored: tuple[str, ...] = ()

    def quantizes(self, names: Iterable[str]) -> bool:
        """Whether these layers, which have one weight together, are quantized while loading."""
        return not self.is_stored and not any(
            matches(pattern, name) for name in names for pattern in self.ignored
        )


def matches(pattern: str, name: str) -> bool:
    """Whether a layer is the one of that name, or in it; behind "re:" the pattern is a regular
    expression, which may match a part from the name's beginning, as in `compressed-tensors`."""
    if pattern.startswith(_PATTERN_PREFIX):
        return re.match(pattern.removeprefix(_PATTERN_PREFIX), name) is not None
    return name == pattern or name.startswith(f"{pattern}.")


def read_quantization(raw: Mapping[str, Any]) -> Quantization | None:
    """From the parsed config.json; None if it isn't quantized.

    Understands what `compressed-tensors` writes for W8A8 fp8, and the "fp8" method of vLLM and
    transformers. Raises StartupError for anything else.
    """
    config = raw.get("quantization_config") or raw.get("compression_config")
    if not config:
        return None
    method = config.get("quant_method", "unknown")
    match method:
        case "fp8":
            return _fp8(config)
        case "compressed-tensors":
            return _compressed_tensors(config)
        case _:
            raise _unserved(f"({method})")


def requested_quantization(method: str | None, stored: Quantization | None) -> Quantization | None:
    """What `--quantization` makes of a checkpoint that is `stored` so.

    As in vLLM, "fp8" quantizes unquantized weights while loading, and a quantized checkpoint takes
    its own method's name or none. Raises StartupError for other combinations.
    """
    if method is None or (stored is not None and stored.method == method):
        return stored
    if stored is not None:
        raise StartupError(
            f"--quantization {method} doesn't fit: the checkpoint is quantized by "
            f"{stored.method}; leave the flag out."
        )
    if method != "fp8":
        raise StartupError(
            f"--quantization {method} needs a checkpoint that is quantized so; unquantized weights "
            "can be served in fp8 with --quantization fp8."
        )
    return Quantization("fp8", is_stored=False)


def ignoring(
    ignored: Sequence[str], quantization: Quantization | None, *, layers: Sequence[str]
) -> Quantization:
    """What `--quantization-ignore` makes of it; `layers` are the names of all linear layers.

    Raises StartupError if nothing is quantized while loading, or a pattern is none or finds none.
    """
    if quantization is None or quantization.is_stored:
        raise StartupError(
            "--quantization-ignore is for weights that --quantization fp8 quantizes while loading."
        )
    for pattern in ignored:
        try:
            is_found = any(matches(pattern, name) for name in layers)
        except (re.error, OverflowError) as error:
            raise StartupError(
                f"--quantization-ignore {pattern!r} is no pattern: {error}."
            ) from error
        if not is_found:
            raise StartupError(
                f"--quantization-ignore {pattern!r} names no linear layer; the last one's name is "
                f"{layers[-1]}."
            )
    return replace(quantization, ignored=tuple(ignored))


def _fp8(config: Mapping[str, Any]) -> Quantization:
    scheme = config.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise _unserved(f"(fp8 with activation_scheme {scheme!r})")
    return Quantization("fp8", scheme, block=_block(config.get("weight_block_size")))


def _compressed_tensors(config: Mapping[str, Any]) -> Quantization:
    groups = [*config.get("config_groups", {}).values()]
    schemes = {_group_scheme(group) for group in groups}
    if len(schemes) != 1 or config.get("sparsity_config"):
        raise _unserved("(compressed-tensors, of several schemes or none, or sparse)")
    activations, block = schemes.pop()
    kv_scheme: dict[str, Any] | None = config.get("kv_cache_scheme")
    if kv_scheme is not None and not _is_fp8(kv_scheme, "tensor"):
        raise _unserved("(compressed-tensors, with keys and values other than fp8)")
    return Quantization(
        "compressed-tensors", activations, block=block, has_fp8_kv=kv_scheme is not None
    )


def _group_scheme(group: Mapping[str, Any]) -> tuple[Activations, tuple[int, int]]:
    weights: dict[str, Any] = group.get("weights") or {}
    inputs: dict[str, Any] | None = group.get("input_activations")
    if not _is_fp8(weights, "channel", "tensor", "block"):
        raise _unserved("(compressed-tensors, with weights other than fp8)")
    block = _block(weights.get("block_structure"))
    if inputs is None:
        return "none", block
    if not _is_fp8(inputs, "token", "tensor", "group"):
        raise _unserved("(compressed-tensors, with inputs other than fp8)")
    return "dynamic" if inputs.get("dynamic") else "static", block


def _is_fp8(scheme: Mapping[str, Any], *strategies: str) -> bool:
    return (
        (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
        and bool(scheme.get("symmetric", True))
        and scheme.get("strategy") in strategies
    )


def _block(sizes: Any) -> tuple[int, int]:  # noqa: ANN401  (JSON)
    if not sizes:
        return _BLOCK
    rows, columns = sizes
    return int(rows), int(columns)


def _unserved(what: str) -> StartupError:
    return StartupError(f"The checkpoint is quantized {what}; {_SERVED}.")
