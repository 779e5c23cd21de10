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


@dataclass(frozen=True, slots=True, eq=False)
class RandomRows:
    """Rows with a temperature. `index` int64 [n] are their places in the step, None for all."""

    index: Tensor | None
    places: NDArray[np.int64]
    keys: NDArray[np.uint64]
    temperature: Tensor  # float32 [n, 1]
    filtered: "FilteredRows | None"


@dataclass(frozen=True, slots=True, eq=False)
class FilteredRows:
    """Random rows with top-k, top-p or min-p; `index` int64 [n] counts among the random rows."""

    index: Tensor | None
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor | None
    max_top_k: int | None  # None if a row has no top-k


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
    greedy: Tensor | None  # places of the rows without temperature, where there are both kinds
    penalized: PenaltyRows | None
    biased: BiasEntries | None
    stops: StopEntries | None
    logprobs: LogprobRows | None

    @property
    def is_plain_greedy(self) -> bool:
        """Every row takes the largest logit as it comes, and nothing else is wanted."""
        needs = (self.random, self.penalized, self.biased, self.stops, self.logprobs)
        return all(need is None for need in needs)


def group_rows(table: SamplingTable, rows: NDArray[np.int64], device: torch.device) -> RowGroups:
    """`rows` [num_rows] are the step's sampling rows, in order."""
    records = table.gather(rows)
    is_random = records["temperature"] > 0.0
    is_mixed = is_random.any() and not is_random.all()
    return RowGroups(
        random=_random_rows(records, is_random, device),
        greedy=_index(~is_random, device) if is_mixed else None,
        penalized=_penalized_rows(records, device),
        biased=_bias_entries(table, rows, records, device),
        stops=_stop_entries(table, rows, records),
        logprobs=_logprob_rows(records, device),
    )


def _random_rows(
    records: NDArray[Any], is_random: NDArray[np.bool_], device: torch.device
) -> RandomRows | None:
    if not is_random.any():
        return None
    records = records[is_random]
    return RandomRows(
        index=_index(is_random, device),
        places=is_random.nonzero()[0],
        keys=records["key"],
        temperature=to_device(records["temperature"], device).unsqueeze(-1),
        filtered=_filtered_rows(records, device),
    )


def _filtered_rows(records: NDArray[Any], device: torch.device) -> FilteredRows | None:
    is_filtered = (records["top_k"] > 0) | (records["top_p"] < 1.0) | (records["min_p"] > 0.0)
    if not is_filtered.any():
        return None
    index = _index(is_filtered, device)
    records = records[is_filtered]
    top_k = records["top_k"]
    return FilteredRows(
        index=index,
        top_k=to_device(top_k, device),
        top_p=to_device(records["top_p"], device),
        min_p=to_device(records["min_p"], device) if records["min_p"].any() else None,
        max_top_k=int(top_k.max()) if top_k.all() else None,
    )


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


def _index(selected: NDArray[np.bool_], device: torch.device) -> Tensor | None:
    """Places of the selected rows, None if that's all of them."""
    return None if selected.all() else to_device(selected.nonzero()[0], device)
