"""Rotary position embedding parameters as config.json spells them, old and new.

transformers 5 writes one `rope_parameters` table; older files have `rope_theta` beside
`rope_scaling`. Both are read here; `engine.layers.rope` turns the result into a cos/sin table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from protocol.errors import StartupError

_DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class NoScaling:
    """Rotary embeddings as in RoFormer (arXiv:2104.09864)."""


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """NTK-aware scaling of theta for sequences beyond the trained length."""

    factor: float
    original_max_len: int


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's: long wavelengths divided by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071); `attention_factor` multiplies cos and sin."""

    factor: float
    original_max_len: int
    attention_factor: float | None
    mscale: float | None
    mscale_all_dim: float | None
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE (arXiv:2402.13753): one divisor a frequency, a short and a long set of them."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    factor: float
    attention_factor: float | None
    original_max_len: int


RopeScaling: TypeAlias = (
    NoScaling | LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling
)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """`rotary_dim` leading values of each head are rotated, in halves."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling

    @property
    def switch_len(self) -> int | None:
        """Longest sequence with the short frequencies; longer ones use others throughout.

        None if the frequencies don't depend on a sequence's length.
        """
        match self.scaling:
            case DynamicScaling() | LongRopeScaling():
                return self.scaling.original_max_len
            case _:
                return None

    def context_len(self, max_position_embeddings: int) -> int:
        """Tokens that the model can attend over, scaling included, as vLLM derives it.

        Files with linear and dynamic scaling keep the unscaled length in
        `max_position_embeddings`; those with YaRN write either, so its own fields decide.
        """
        match self.scaling:
            case LinearScaling() | DynamicScaling():
                return int(max_position_embeddings * self.scaling.factor)
            case YarnScaling():
                return int(self.scaling.original_max_len * self.scaling.factor)
            case _:
                return max_position_embeddings


def read_rope_config(raw: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """The rope part of a parsed config.json; raises StartupError for what isn't supported."""
    parameters: dict[str, Any] = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or _DEFAULT_THETA)
    partial = parameters.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    try:
        scaling = _read_scaling(rope_type, parameters, raw)
    except KeyError as error:
        raise StartupError(
            f"config.json's rope scaling of type {rope_type!r} lacks {error.args[0]!r}."
        ) from error
    return RopeConfig(theta=theta, rotary_dim=int(head_dim * partial), scaling=scaling)


def _read_scaling(
    rope_type: str, parameters: Mapping[str, Any], raw: Mapping[str, Any]
) -> RopeScaling:
    max_len = int(raw["max_position_embeddings"])
    original_max_len = int(
        raw.get("original_max_position_embeddings")
        or parameters.get("original_max_position_embeddings")
        or max_len
    )
    match rope_type:
        case "default":
            return NoScaling()
        case "linear":
            return LinearScaling(float(parameters["factor"]))
        case "dynamic":
            return DynamicScaling(float(parameters["factor"]), max_len)
        case "llama3":
            return Llama3Scaling(
                factor=float(parameters["factor"]),
                low_freq_factor=float(parameters["low_freq_factor"]),
                high_freq_factor=float(parameters["high_freq_factor"]),
                original_max_len=original_max_len,
            )
        case "yarn":
            return YarnScaling(
                factor=float(parameters.get("factor") or max_len / original_max_len),
                original_max_len=original_max_len,
                attention_factor=parameters.get("attention_factor"),
                mscale=parameters.get("mscale"),
                mscale_all_dim=parameters.get("mscale_all_dim"),
                beta_fast=float(parameters.get("beta_fast") or 32),
                beta_slow=float(parameters.get("beta_slow") or 1),
                truncate=bool(parameters.get("truncate", True)),
            )
        case "longrope" | "su":
            return LongRopeScaling(
                short_factors=tuple(parameters["short_factor"]),
                long_factors=tuple(parameters["long_factor"]),
                factor=float(parameters.get("factor") or max_len / original_max_len),
                attention_factor=parameters.get("attention_factor"),
                original_max_len=original_max_len,
            )
        case _:
            raise StartupError(
                f"config.json asks for rope scaling of type {rope_type!r}; "
                "supported are linear, dynamic, llama3, yarn and longrope."
            )
