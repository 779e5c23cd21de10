"""The offline API: a model in your own process, prompts in, texts out.

>>> from engine import LLM, SamplingParams
>>> LLM().generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
"""

import itertools
import time
from collections.abc import Mapping
from collections.abc import Sequence as ListOf
from typing import Any, TypeAlias, cast

import msgspec
from tqdm import tqdm

from engine.beam_search import BeamSearchParams, beam_output, beam_search
from engine.completion import Completion
from engine.config import engine_config
from engine.encoder import EncoderEngine
from engine.engine import Engine
from engine.grammar import check_grammar
from engine.job import Job
from engine.models.encoder_config import is_encoder
from engine.outputs import (
    BeamSearchOutput,
    Embedding,
    EmbeddingRequestOutput,
    RequestOutput,
)
from engine.prompts import Prompt, as_prompts, encode_prompt
from engine.sampler.sampled import NO_REPORT
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.step_loop import StepLoop
from engine.tokenizer import ChatTemplate, Tokenizer
from engine.weights.generation_defaults import read_generation_defaults
from engine.weights.model_dir import resolve_model
from engine.weights.pooling_config import read_encoder_pooling_type, read_pooling_type
from protocol.errors import InvalidRequestError
from protocol.ids import RequestKey
from protocol.pooling import PoolingParams, PoolingType
from protocol.request import Request, TokenLogprobs

Message: TypeAlias = Mapping[str, Any]

# Prefill samples a token whether anybody wants it or not.
_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)


class LLM:
    """Loads a model; then `generate`, `chat`, `embed` and `beam_search` as often as you like, from
    one thread."""

    def __init__(
        self,
        model: str | None = None,
        **options: Any,  # noqa: ANN401  (EngineConfig's fields)
    ) -> None:
        """`model` is a local directory, a hub id, or None for the built-in one. Raises StartupError
        if there's no such option, or the model can't be loaded."""
        config = engine_config({"model": model, **options})
        model_dir = resolve_model(model)
        self.tokenizer = Tokenizer.from_dir(model_dir)
        self._job_numbers = itertools.count()
        self._pooling_type: PoolingType
        self._defaults = SamplingParams()
        self._engine: Engine | EncoderEngine
        if is_encoder(model_dir):
            self._pooling_type = read_encoder_pooling_type(model_dir)
            self._engine = EncoderEngine.load(config, progress=True)
        else:
            self._pooling_type = read_pooling_type(model_dir)
            self._engine = Engine.load(config, progress=True)
            self._defaults = SamplingParams(**read_generation_defaults(model_dir))
            self._loop = StepLoop(self._engine)

    @property
    def engine(self) -> Engine:
        """What generates. Raises InvalidRequestError if the model only embeds."""
        if isinstance(self._engine, EncoderEngine):
            raise InvalidRequestError(
                "This model only embeds texts: `embed` is all it does.", field="model"
            )
        return self._engine

    def get_tokenizer(self) -> Tokenizer:
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's makers recommend: used where none are given."""
        return self._defaults

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached blocks."""
        self.engine.pool.reset_cache()
        return True

    def generate(
        self,
        prompts: Prompt | ListOf[Prompt],
        sampling_params: SamplingParams | ListOf[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continues each prompt; results are in the prompts' order.

        A prompt is a text, token ids, `{"prompt": text}` or `{"prompt_token_ids": [...]}`;
        `sampling_params` are for all prompts or one for each. Raises InvalidRequestError before
        anything runs if one can't be served.
        """
        prompts = as_prompts(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or self._defaults] * len(prompts)
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
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_options: Any,  # noqa: ANN401  (options of ChatTemplate.render)
    ) -> list[RequestOutput]:
        """Answers one conversation or several, through the model's chat template or the Jinja
        source `chat_template`, which `chat_template_kwargs` are further names for."""
        template_options["variables"] = chat_template_kwargs
        if chat_template is not None:
            special_tokens = self.tokenizer.special_tokens
            template_options["template"] = ChatTemplate(chat_template, special_tokens)
        is_one = all(isinstance(message, Mapping) for message in messages)
        conversations = cast("ListOf[ListOf[Message]]", [messages] if is_one else messages)
        prompts: list[Prompt] = [
            {"prompt_token_ids": self.tokenizer.apply_chat_template(chat, **template_options)}
            for chat in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def embed(
        self,
        prompts: Prompt | ListOf[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """One vector for each prompt, by default as the model's directory says.

        Raises InvalidRequestError before anything runs if a prompt can't be served.
        """
        prompts = as_prompts(prompts)
        pooling = pooling_params or PoolingParams(type=self._pooling_type)
        engine = self._engine
        pooling.validate(engine.model.hidden_size, is_encoder=isinstance(engine, EncoderEngine))
        if isinstance(engine, EncoderEngine):
            texts = [self._encoded(prompt) for prompt in prompts]
            vectors = engine.embed_all(
                [token_ids for _, token_ids in texts], pooling, progress=use_tqdm
            )
            return [
                EmbeddingRequestOutput(
                    str(next(self._job_numbers)), text, token_ids, Embedding.of(vector)
                )
                for (text, token_ids), vector in zip(texts, vectors, strict=True)
            ]
        jobs = [self._job(prompt, _ONE_TOKEN, pooling) for prompt in prompts]
        self._run(jobs, use_tqdm=use_tqdm)
        return [
            EmbeddingRequestOutput(
                job.request_id, job.prompt, job.token_ids, Embedding.of(job.report.pooled or b"")
            )
            for job in jobs
        ]

    def beam_search(
        self, prompts: Prompt | ListOf[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt. Raises InvalidRequestError."""
        params.validate()
        token_ids = [self._encoded(prompt)[1] for prompt in as_prompts(prompts)]
        found = beam_search(
            token_ids,
            params,
            eos_token_ids=frozenset(self.engine.model.eos_token_ids),
            likeliest=self._likeliest,
        )
        return [beam_output(beams, self.tokenizer) for beams in found]

    def _likeliest(self, texts: list[list[int]], count: int) -> list[TokenLogprobs]:
        """What can follow each text; what they have in common comes from the prefix cache."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=count)
        jobs = [self._job({"prompt_token_ids": text}, sampling) for text in texts]
        self._run(jobs, use_tqdm=False)
        return [job.completions[0].last_logprobs for job in jobs]

    def _encoded(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """As `encode_prompt`."""
        return encode_prompt(prompt, self.tokenizer, vocab_size=self._engine.model.vocab_size)

    def _job(
        self, prompt: Prompt, sampling: SamplingParams, pooling: PoolingParams | None = None
    ) -> Job:
        sampling = sampling.for_tokenizer(self.tokenizer)
        sampling.validate()
        grammars = self.engine.grammars
        if sampling.structured_outputs is not None and grammars is not None:
            check_grammar(grammars, sampling.structured_outputs, "structured_outputs")
        text, token_ids = self._encoded(prompt)
        request_id = str(next(self._job_numbers))
        return Job(
            request_id,
            text,
            token_ids,
            [
                self._sequence(request_id, token_ids, sampling, i, pooling)
                for i in range(sampling.n)
            ],
            [Completion(i, sampling, self.tokenizer) for i in range(sampling.n)],
        )

    def _sequence(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: SamplingParams,
        index: int,
        pooling: PoolingParams | None,
    ) -> Sequence:
        """Each of `n` outputs is a request of its own, and has its own random numbers."""
        if index:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        max_model_len = self._loop.scheduler.max_model_len
        room = max(1, max_model_len - len(token_ids))
        max_tokens = min(sampling.max_tokens or room, room)
        seed = None if sampling.seed is None else sampling.seed + index
        request = Request(
            key=RequestKey(f"{request_id}-{index}", 1),
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling=msgspec.structs.replace(sampling, n=1, max_tokens=max_tokens, seed=seed),
            pooling=pooling,
        )
        root = self.engine.root_hash(None, max_seq_len=len(token_ids) + max_tokens)
        return Sequence(request=request, root=root, arrival_s=time.monotonic())

    def _run(self, jobs: list[Job], *, use_tqdm: bool) -> None:
        completions = {
            sequence.key: (job, completion)
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
            self._loop.settle()

    def _run_steps(
        self, completions: dict[RequestKey, tuple[Job, Completion]], bar: "tqdm[Any]"
    ) -> None:
        num_tokens = 0
        start_s = time.perf_counter()
        while self._loop.has_work:
            for result in self._loop.step():
                num_tokens += len(result.update.new_token_ids)
                key = result.update.sequence.key
                job, completion = completions[key]
                if result.prompt is not NO_REPORT:
                    job.report = result.prompt
                if result.failure is None:
                    completion.push(result.update, result.logprobs)
                else:
                    completion.give_up(result.failure.message)
                if completion.finish_reason is not None:
                    self._loop.abort(key)
                    rate = num_tokens / (time.perf_counter() - start_s)
                    bar.set_postfix_str(f"{rate:.1f} tok/s", refresh=False)
                    bar.update()
