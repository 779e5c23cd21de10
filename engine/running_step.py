"""A step that the device works on."""

from collections.abc import Callable, Mapping

import torch

from engine.sampler.pending import PendingRows, SampledRows
from engine.sampler.sampled import NO_REPORT, PromptReport, SampledToken
from engine.scheduler.plan import ScheduledSequence
from engine.sequence import Sequence


class RunningStep:
    """What `ModelRunner.launch` leaves behind: everything is queued, nothing has been waited for.

    Its sequences' tokens are chosen by `sample`, at once or later; those of sequences that know
    theirs by then aren't.
    """

    def __init__(
        self,
        sampling: list[ScheduledSequence],
        sample: Callable[[list[int]], PendingRows] | None,
        *,
        reports: Mapping[Sequence, PromptReport],
        device: torch.device,
    ) -> None:
        """`sample` chooses tokens for the places in `sampling` that it's given; None if no
        sequence samples."""
        self._sampling = sampling
        self._sequences: list[Sequence] = []
        self._sample = sample
        self._pending: PendingRows | None = None
        self._reports = reports
        self._device = device
        self._done = self._record()

    @property
    def may_be_followed(self) -> bool:
        """Whether its sequences' next step may be launched before this one's `result`."""
        return self._sample is None and not self._reports

    @property
    def is_free(self) -> bool:
        """Whether that next step may also be sampled before then."""
        return self._sample is None and (self._pending is None or self._pending.is_free)

    def sample(self) -> None:
        """Queues the choice of tokens. The steps before are committed, unless their rows were
        free; nothing happens if it's done or nobody samples."""
        if self._sample is not None:
            sample, self._sample = self._sample, None
            places = [i for i, item in enumerate(self._sampling) if item.samples]
            self._sequences = [self._sampling[i].sequence for i in places]
            if places:
                self._pending = sample(places)
                self._done = self._record()

    def result(self) -> list[SampledToken]:
        """One token for each sequence that sampled, in order. Waits for the device: afterwards
        other streams find this step's KV, too. Call it once, behind `sample`."""
        if self._done is not None:
            self._done.synchronize()
        if self._pending is None:
            return []
        sampled = self._pending.read()
        if sampled.logprobs is None and not sampled.failures and not self._reports:
            return [
                SampledToken(sequence, token_id, None)
                for sequence, token_id in zip(self._sequences, sampled.token_ids, strict=True)
            ]
        return self._reported(sampled)

    def _record(self) -> torch.cuda.Event | None:
        """Marks where the device will be when it's through with what is queued."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _reported(self, sampled: SampledRows) -> list[SampledToken]:
        logprobs = sampled.logprobs or [None] * len(self._sequences)
        columns = zip(self._sequences, sampled.token_ids, logprobs, strict=True)
        return [
            SampledToken(
                sequence,
                token_id,
                logprob,
                self._reports.get(sequence, NO_REPORT),
                sampled.failures.get(place),
            )
            for place, (sequence, token_id, logprob) in enumerate(columns)
        ]
