"""Makes one output's text, logprobs and end of its tokens, as they come."""

from dataclasses import dataclass, field

from engine.outputs import CompletionOutput, Logprob
from engine.sampling_params import SamplingParams
from engine.scheduler.plan import SequenceUpdate
from engine.tokenizer import IncrementalDetokenizer, StopMatcher, Tokenizer
from protocol.request import FinishReason, TokenLogprobs

_NOTHING_KNOWN = TokenLogprobs(0.0, 0, [], [])


@dataclass(slots=True)
class Completion:
    """One of a request's outputs while it grows."""

    index: int
    sampling: SamplingParams
    tokenizer: Tokenizer
    token_ids: list[int] = field(default_factory=list[int])
    finish_reason: FinishReason | None = None
    last_logprobs: TokenLogprobs = _NOTHING_KNOWN
    _stop_reason: int | str | None = None
    _logprobs: list[dict[int, Logprob]] = field(default_factory=list[dict[int, Logprob]])
    _cumulative_logprob: float = 0.0
    _parts: list[str] = field(default_factory=list[str])
    _detokenizer: IncrementalDetokenizer = field(init=False)
    _matcher: StopMatcher = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.sampling
        self._detokenizer = IncrementalDetokenizer(
            self.tokenizer, skip_special_tokens=sampling.skip_special_tokens
        )
        self._matcher = StopMatcher(sampling.stop, include=sampling.include_stop_str_in_output)

    def push(self, update: SequenceUpdate, logprobs: TokenLogprobs | None) -> None:
        """Takes a step's tokens, `logprobs` of the first; `finish_reason` is set afterwards if the
        output ended. A stop string among them ends it right behind it."""
        if logprobs is not None:
            self.last_logprobs = logprobs
            self._cumulative_logprob += logprobs.logprob
            named = named_logprobs(self.tokenizer, update.new_token_ids[0], logprobs)
            self._logprobs.append(named)
        ended_by_token = update.finish_reason == "stop"
        hides_last = ended_by_token and not self.sampling.include_stop_str_in_output
        num_shown = len(update.new_token_ids) - hides_last
        for i, token_id in enumerate(update.new_token_ids):
            self.token_ids.append(token_id)
            if i < num_shown and self.sampling.detokenize:
                self._push_text(self._detokenizer.push([token_id]))
            if self._matcher.matched is not None:
                self.finish_reason, self._stop_reason = "stop", self._matcher.matched
                return
        if update.finish_reason is not None:
            self._push_text(self._detokenizer.finish())
            self._parts.append(self._matcher.finish())
            self.finish_reason, self._stop_reason = update.finish_reason, update.stop_token_id

    def give_up(self, reason: str) -> None:
        """It can't go on."""
        self._push_text(self._detokenizer.finish())
        self._parts.append(self._matcher.finish())
        self.finish_reason, self._stop_reason = "abort", reason

    def output(self) -> CompletionOutput:
        """The finished output."""
        assert self.finish_reason is not None
        has_logprobs = self.sampling.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="".join(self._parts),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            logprobs=self._logprobs if has_logprobs else None,
            cumulative_logprob=self._cumulative_logprob if has_logprobs else None,
        )

    def _push_text(self, text: str) -> None:
        """Before `min_tokens`, text neither ends the output nor begins what ends it."""
        if len(self.token_ids) > self.sampling.min_tokens:
            text = self._matcher.push(text)
        self._parts.append(text)


def named_logprobs(
    tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs
) -> dict[int, Logprob]:
    """The likeliest tokens of one place, and the one that is there, by their ids."""
    named = {
        top_id: Logprob(value, rank, tokenizer.decode([top_id], skip_special_tokens=False))
        for rank, (top_id, value) in enumerate(
            zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True), start=1
        )
    }
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    named[token_id] = Logprob(logprobs.logprob, logprobs.rank, text)
    return named
