"""A prompt on its way through `LLM`."""

from dataclasses import dataclass

from engine.completion import Completion, named_logprobs
from engine.outputs import Logprob, RequestOutput
from engine.sampler.sampled import NO_REPORT, PromptReport
from engine.sequence import Sequence


@dataclass(slots=True)
class Job:
    """One prompt with its `n` outputs and their sequences; the first has the prompt reported."""

    request_id: str
    prompt: str | None
    token_ids: list[int]
    sequences: list[Sequence]
    completions: list[Completion]
    report: PromptReport = NO_REPORT

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.token_ids,
            outputs=[completion.output() for completion in self.completions],
            num_cached_tokens=self.sequences[0].num_cached_tokens,
            prompt_logprobs=self._prompt_logprobs(),
        )

    def _prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        if self.report.logprobs is None:
            return None
        tokenizer = self.completions[0].tokenizer
        pairs = zip(self.token_ids[1:], self.report.logprobs, strict=True)
        return [None, *(named_logprobs(tokenizer, *pair) for pair in pairs)]
