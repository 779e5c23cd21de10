"""Which rows of a step need what: made when the step's rows change, reused while they don't."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampler.penalties import PenaltyRows
from engine.sampler.rows import NO_LOGPROBS, NO_PENALTY_SLOT, SamplingTable
from engine.upload import to_device
from kernels.choice import Filters


@dataclass(frozen=True, slots=True, eq=False)
class RandomRows:
    """All rows of a step of which some choose randomly.

    `keys` are [num_rows], `temperature` float32 [num_rows], 0 for those that don't.
    """

    keys: NDArray[np.uint64]
    temperature: Tensor
    filters: Filters | None


@dataclass(frozen=True, slots=True, eq=False)
class BiasEntries:
    """Places (row in the step, token id) of the logits to change, and by how much."""

    places: Tensor
    token_ids: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StopEntries:
    """Logits that are ruled out while `places`' output is shorter than `min_tokens`."""

    places: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    min_tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class LogprobRows:
    index: Tensor
    places: list[int]
    num_top: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class RowGroups:
    """A step's rows by need; None where no row needs it."""

    random: RandomRows | None
    penalized: PenaltyRows | None
    biased: BiasEntries | None
    stops: StopEntries | None
    logprobs: LogprobRows | None

    @property
    def are_plain(self) -> bool:
        """Nothing but a choice among the logits as they come is wanted."""
        needs = (self.penalized, self.biased, self.stops, self.logprobs)
        return all(need is None for need in needs)


def group_rows(table: SamplingTable, rows: NDArray[np.int64], device: torch.device) -> RowGroups:
    """`rows` [num_rows] are the step's sampling rows, in order."""
    records = table.gather(rows)
    return RowGroups(
        random=_random_rows(records, device),
        penalized=_penalized_rows(records, device),
        biased=_bias_entries(table, rows, records, device),
        stops=_stop_entries(table, rows, records),
        logprobs=_logprob_rows(records, device),
    )


def _random_rows(records: NDArray[Any], device: torch.device) -> RandomRows | None:
    if not records["temperature"].any():
        return None
    return RandomRows(
        keys=records["key"],
        temperature=to_device(records["temperature"], device),
        filters=_filters(records, device),
    )


def _filters(records: NDArray[Any], device: torch.device) -> Filters | None:
    top_k, top_p, min_p = (records[name] for name in ("top_k", "top_p", "min_p"))
    if not (top_k.any() or min_p.any() or (top_p < 1.0).any()):
        return None
    return Filters(*(to_device(column, device) for column in (top_k, top_p, min_p)))


def _penalized_rows(records: NDArray[Any], device: torch.device) -> PenaltyRows | None:
    places = (records["penalty_slot"] != NO_PENALTY_SLOT).nonzero()[0]
    if not len(places):
        return None
    records = records[places]
    return PenaltyRows(
        places=to_device(places, device),
        slots=to_device(records["penalty_slot"], device),
        repetition=to_device(records["repetition_penalty"], device),
        presence=to_device(records["presence_penalty"], device),
        frequency=to_device(records["frequency_penalty"], device),
    )


def _bias_entries(
    table: SamplingTable, rows: NDArray[np.int64], records: NDArray[Any], device: torch.device
) -> BiasEntries | None:
    places = records["has_bias"].nonzero()[0]
    if not len(places):
        return None
    entries = [table.adjustments(row) for row in rows[places].tolist()]
    return BiasEntries(
        places=to_device(np.repeat(places, [len(e.bias_values) for e in entries]), device),
        token_ids=to_device(np.concatenate([e.bias_token_ids for e in entries]), device),
        values=to_device(np.concatenate([e.bias_values for e in entries]), device),
    )


def _stop_entries(
    table: SamplingTable, rows: NDArray[np.int64], records: NDArray[Any]
) -> StopEntries | None:
    places = (records["min_tokens"] > 0).nonzero()[0]
    if not len(places):
        return None
    entries = [table.adjustments(row) for row in rows[places].tolist()]
    counts = [len(e.stop_token_ids) for e in entries]
    return StopEntries(
        places=np.repeat(places, counts),
        token_ids=np.concatenate([e.stop_token_ids for e in entries]),
        min_tokens=np.repeat(records["min_tokens"][places], counts),
    )


def _logprob_rows(records: NDArray[Any], device: torch.device) -> LogprobRows | None:
    places = (records["num_logprobs"] != NO_LOGPROBS).nonzero()[0]
    if not len(places):
        return None
    return LogprobRows(
        index=to_device(places, device),
        places=places.tolist(),
        num_top=records["num_logprobs"][places].tolist(),
    )
