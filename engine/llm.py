"""The offline API: a model in your own process, prompts in, texts out.

>>> from engine import LLM, SamplingParams
>>> LLM().generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
"""

import itertools
import time
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import msgspec
from tqdm import tqdm

from engine.completion import Completion
from engine.config import EngineConfig
from engine.engine import Engine
from engine.outputs import RequestOutput, TokensPrompt
from engine.sequence import Sequence
from engine.step_loop import StepLoop
from engine.tokenizer import Tokenizer
from engine.weights.model_dir import resolve_model
from protocol.errors import InvalidRequestError
from protocol.ids import RequestKey
from protocol.request import Request
from protocol.sampling import SamplingParams

Prompt: TypeAlias = str | TokensPrompt
Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Job:
    """One prompt with its `n` outputs and their sequences."""

    request_id: str
    prompt: str | None
    token_ids: list[int]
    sequences: list[Sequence]
    completions: list[Completion]

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.token_ids,
            outputs=[completion.output() for completion in self.completions],
            num_cached_tokens=self.sequences[0].num_cached_tokens,
        )


class LLM:
    """Loads a model; then `generate` and `chat` as often as you like, from one thread."""

    def __init__(
        self,
        model: str | None = None,
        **config: Any,  # noqa: ANN401  (EngineConfig's fields)
    ) -> None:
        """`model` is a local directory, a hub id, or None for the built-in one; `config` are
        `EngineConfig`'s fields. Raises StartupError if the model can't be loaded."""
        engine_config = EngineConfig(model=model, **config)
        self.engine = Engine.load(engine_config, progress=True)
        self.tokenizer = Tokenizer.from_dir(resolve_model(model, progress=False))
        self._loop = StepLoop(self.engine)
        self._job_numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | ListOf[Prompt],
        sampling_params: SamplingParams | ListOf[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues each prompt; results are in the prompts' order.

        A prompt is a text or `{"prompt_token_ids": [...]}`; `sampling_params` are for all prompts
        or one for each. Raises InvalidRequestError before anything runs if one can't be served.
        """
        if isinstance(prompts, str | dict):
            prompts = [prompts]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise InvalidRequestError(
                f"There are {len(prompts)} prompts, but {len(sampling_params)} sampling_params.",
                field="sampling_params",
            )
        jobs = [
            self._job(prompt, sampling)
            for prompt, sampling in zip(prompts, sampling_params, strict=True)
        ]
        self._run(jobs, use_tqdm=use_tqdm)
        return [job.output() for job in jobs]

    def chat(
        self,
        messages: ListOf[Message] | ListOf[ListOf[Message]],
        sampling_params: SamplingParams | ListOf[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template_options: Any,  # noqa: ANN401  (options of ChatTemplate.render)
    ) -> list[RequestOutput]:
        """Answers one conversation or several, through the model's chat template."""
        is_one = all(isinstance(message, Mapping) for message in messages)
        conversations = cast("ListOf[ListOf[Message]]", [messages] if is_one else messages)
        prompts: list[Prompt] = [
            {"prompt_token_ids": self.tokenizer.apply_chat_template(chat, **template_options)}
            for chat in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _job(self, prompt: Prompt, sampling: SamplingParams) -> _Job:
        sampling.validate()
        if sampling.structured_outputs is not None and self.engine.grammars is not None:
            self.engine.grammars.check(sampling.structured_outputs, "structured_outputs")
        if isinstance(prompt, str):
            text, token_ids = prompt, self.tokenizer.encode(prompt)
        else:
            text, token_ids = None, list(prompt["prompt_token_ids"])
        vocab_size = self.engine.model.vocab_size
        if any(not 0 <= token_id < vocab_size for token_id in token_ids):
            raise InvalidRequestError(
                f"Token ids must be between 0 and {vocab_size - 1}.", field="prompt"
            )
        request_id = str(next(self._job_numbers))
        return _Job(
            request_id,
            text,
            token_ids,
            [self._sequence(request_id, token_ids, sampling, i) for i in range(sampling.n)],
            [Completion(i, sampling, self.tokenizer) for i in range(sampling.n)],
        )

    def _sequence(
        self, request_id: str, token_ids: list[int], sampling: SamplingParams, index: int
    ) -> Sequence:
        """Each of `n` outputs is a request of its own, and has its own random numbers."""
        max_model_len = self._loop.scheduler.max_model_len
        room = max(1, max_model_len - len(token_ids))
        max_tokens = min(sampling.max_tokens or room, room)
        seed = None if sampling.seed is None else sampling.seed + index
        request = Request(
            key=RequestKey(f"{request_id}-{index}", 1),
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling=msgspec.structs.replace(sampling, n=1, max_tokens=max_tokens, seed=seed),
        )
        root = self.engine.root_hash(None, max_seq_len=len(token_ids) + max_tokens)
        return Sequence(request=request, root=root, arrival_s=time.monotonic())

    def _run(self, jobs: list[_Job], *, use_tqdm: bool) -> None:
        completions = {
            sequence.key: completion
            for job in jobs
            for sequence, completion in zip(job.sequences, job.completions, strict=True)
        }
        bar = tqdm(total=len(completions), desc="Generating", unit="output", disable=not use_tqdm)
        try:
            with bar:
                for job in jobs:
                    for sequence in job.sequences:
                        self._loop.add(sequence)
                self._run_steps(completions, bar)
        finally:
            # After an error or Ctrl-C the engine is as free as before.
            for key in completions:
                self._loop.abort(key)

    def _run_steps(self, completions: dict[RequestKey, Completion], bar: "tqdm[Any]") -> None:
        num_tokens = 0
        start_s = time.perf_counter()
        while self._loop.has_work:
            for result in self._loop.step():
                num_tokens += 1
                key = result.update.sequence.key
                completion = completions[key]
                completion.push(result.update, result.logprobs)
                if completion.finish_reason is not None:
                    self._loop.abort(key)
                    rate = num_tokens / (time.perf_counter() - start_s)
                    bar.set_postfix_str(f"{rate:.1f} tok/s", refresh=False)
                    bar.update()
