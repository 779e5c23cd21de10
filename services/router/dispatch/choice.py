"""One output of a request while it grows: tokens in, text out, and where it ends."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec

from engine.tokenizer import IncrementalDetokenizer, StopMatcher, Tokenizer
from protocol.request import FinishReason, SequenceOutput, TokenLogprobs
from protocol.sampling import SamplingParams

StopReason: TypeAlias = int | str | None
Watch: TypeAlias = Callable[[str], bool]
"""Fed with an output's text as it comes; True once nothing more is wanted."""


class Delta(msgspec.Struct):
    """What came since the last one was taken; `finish_reason` is set in the last.

    `token_ids` and `logprobs` may be ahead of `text`, which waits until a character is complete
    and can't be part of a stop string.
    """

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_reason: StopReason = None


class Choice:
    """Fed with a sequence's outputs in order. `finish_reason` ends it; the rest is ignored.

    Memory is bounded by the sequence's longest output, however late `take` is called.
    """

    __slots__ = (
        "_detokenizer",
        "_parts",
        "_pending",
        "_sampling",
        "_stop",
        "_watch",
        "finish_reason",
        "num_tokens",
    )

    def __init__(
        self, tokenizer: Tokenizer, sampling: SamplingParams, watch: Watch | None = None
    ) -> None:
        """`watch` may end it, as a stop string does."""
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        self._sampling = sampling
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=sampling.skip_special_tokens
        )
        self._stop: StopMatcher | None = None
        self._watch = watch
        if sampling.stop or watch is not None:
            self._stop = StopMatcher(sampling.stop, include=sampling.include_stop_str_in_output)
        self._parts: list[str] = []
        self._pending = Delta()

    def push(self, output: SequenceOutput) -> None:
        """Takes the next tokens. A stop string among them ends the choice right behind it."""
        token_ids = output.token_ids
        if self._stop is None:
            self._accept(token_ids, output.logprobs)
            self._append(self._text(token_ids, output))
        else:
            for i, token_id in enumerate(token_ids):
                self._accept([token_id], output.logprobs and output.logprobs[i : i + 1])
                is_last = i == len(token_ids) - 1
                text = self._text([token_id], output if is_last else None)
                if self._match(self._stop, text):
                    return
        if output.finish_reason is not None:
            self._end(output)

    def abort(self) -> None:
        """Ends it where it is, without an answer from the worker."""
        self.finish_reason = self._pending.finish_reason = "abort"

    @property
    def has_news(self) -> bool:
        """Whether `take` has something worth sending."""
        pending = self._pending
        return bool(self._parts or pending.finish_reason or pending.logprobs)

    def take(self) -> Delta:
        """Everything since the last call."""
        delta, self._pending = self._pending, Delta()
        delta.text = "".join(self._parts)
        self._parts.clear()
        return delta

    def _append(self, text: str) -> None:
        if text:
            self._parts.append(text)

    def _accept(self, token_ids: list[int], logprobs: Sequence[TokenLogprobs] | None) -> None:
        self.num_tokens += len(token_ids)
        self._pending.token_ids += token_ids
        if logprobs:
            self._pending.logprobs += logprobs

    def _text(self, token_ids: list[int], output: SequenceOutput | None) -> str:
        """The tokens' text, less the last one's if that is what ended the output."""
        ended_by_token = output is not None and output.finish_reason == "stop"
        if ended_by_token and not self._sampling.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        return self._detokenizer.push(token_ids)

    def _match(self, stop: StopMatcher, text: str) -> bool:
        # Before min_tokens, text neither ends the output nor begins what ends it.
        if self.num_tokens > self._sampling.min_tokens:
            text = stop.push(text)
        self._append(text)
        is_enough = self._watch is not None and self._watch(text)
        if stop.matched is None and not is_enough:
            return False
        self._finish("stop", stop.matched)
        return True

    def _end(self, output: SequenceOutput) -> None:
        assert output.finish_reason is not None
        rest = self._detokenizer.finish()
        if self._stop is not None:
            if self._match(self._stop, rest):
                return
            rest = self._stop.finish()
        self._append(rest)
        self._finish(output.finish_reason, output.stop_token_id)

    def _finish(self, reason: FinishReason, stop_reason: StopReason) -> None:
        self.finish_reason = self._pending.finish_reason = reason
        self._pending.stop_reason = stop_reason
