"""A step that the device works on."""

from collections.abc import Mapping

import torch

from engine.sampler.pending import PendingRows, SampledRows
from engine.sampler.sampled import NO_REPORT, PromptReport, SampledToken
from engine.sequence import Sequence


class RunningStep:
    """What `ModelRunner.launch` leaves behind: everything is queued, nothing has been waited for.

    `pending` are the tokens of `sequences`, None if no sequence samples.
    """

    def __init__(
        self,
        sequences: list[Sequence],
        pending: PendingRows | None,
        *,
        reports: Mapping[Sequence, PromptReport],
        device: torch.device,
    ) -> None:
        self._sequences = sequences
        self._pending = pending
        self._reports = reports
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(device))

    @property
    def is_free(self) -> bool:
        """Whether its sequences' next step may be launched before this one's `result`."""
        return self._pending is not None and self._pending.is_free and not self._reports

    def result(self) -> list[SampledToken]:
        """One token for each sequence that sampled, in order. Waits for the device: afterwards
        other streams find this step's KV, too. Call it once."""
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
