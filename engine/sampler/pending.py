"""A step's tokens from the moment they're chosen on the device until the host has them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from engine.sampler.constraints import Constraint, Constraints
from engine.sampler.logprobs import PendingLogprobs
from engine.sampler.sampled import OutputFailure
from engine.sampler.thoughts import ThoughtLimits, Thoughts
from engine.upload import to_host
from protocol.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class SampledRows:
    """One token a row, in the order of the rows given; `logprobs` None if no row asked.

    `failures` are of rows, by their place, that can't go on.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    failures: Mapping[int, OutputFailure] = field(default_factory=dict[int, OutputFailure])


@dataclass(frozen=True, slots=True)
class HeldRows:
    """Rows, by place, whose next token depends on this one by rules that the host applies."""

    constrained: list[tuple[int, Constraint]]
    limited: list[tuple[int, Thoughts]]
    failures: Mapping[int, OutputFailure] = field(default_factory=dict[int, OutputFailure])

    def __bool__(self) -> bool:
        return bool(self.constrained or self.limited)


class PendingRows:
    """`token_ids` int64 [num_rows] stay on the device, where the next step can take them."""

    def __init__(
        self,
        token_ids: Tensor,
        *,
        held: HeldRows | None = None,
        logprobs: PendingLogprobs | None = None,
        logprob_places: list[int] | None = None,
    ) -> None:
        """`logprobs` are of the rows at `logprob_places`."""
        self.token_ids = token_ids
        self._on_host = to_host(token_ids)
        self._held = held
        self._logprobs = logprobs
        self._logprob_places = logprob_places or []

    @property
    def is_free(self) -> bool:
        """Whether the rows' next tokens can be chosen before the host has read these."""
        return not self._held

    def read(self) -> SampledRows:
        """Call it once, when the device is done."""
        token_ids: list[int] = self._on_host.tolist()
        held = self._held
        if held is not None:
            Constraints.accept(held.constrained, token_ids)
            ThoughtLimits.accept(held.limited, token_ids)
        failures = {} if held is None else held.failures
        if self._logprobs is None:
            return SampledRows(token_ids, None, failures)
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        for place, value in zip(self._logprob_places, self._logprobs.read(), strict=True):
            logprobs[place] = value
        return SampledRows(token_ids, logprobs, failures)
