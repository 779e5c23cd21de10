"""/v1/chat/completions and /v1/completions: from a body to an answer."""

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
from fastapi import Request, Response

from protocol.errors import InvalidRequestError
from protocol.sampling import SamplingParams
from services.router.dispatch.admission import AdmissionQueue
from services.router.dispatch.dispatch import Dispatcher
from services.router.dispatch.generation import Generation, GenerationSpec, TokenObserver
from services.router.http.body import BodyReader
from services.router.http.client import Client
from services.router.http.event_stream import EventStream
from services.router.http.headers import header
from services.router.http.open_request import OpenRequest
from services.router.http.whole_answer import WholeAnswer
from services.router.openai.answers import AnswerFormat, AnswerHead, AnswerOptions
from services.router.openai.bodies import ChatBody, CompletionBody, SamplingBody
from services.router.openai.chat_answers import ChatAnswers
from services.router.openai.chat_reader import ReadingRules
from services.router.openai.completion_answers import CompletionAnswers
from services.router.openai.constraints import token_constraints
from services.router.openai.logprobs import TokenNames
from services.router.openai.prompts import MAX_PROMPTS, PromptEncoder, truncated
from services.router.openai.sampling import (
    bounded_max_tokens,
    chat_sampling,
    completion_sampling,
    is_prompt_only,
)
from services.router.openai.structured_outputs import StructuredOutputs
from services.router.openai.template_input import text_of
from services.router.openai.tool_choice import NO_TOOLS, ChatRules, ToolUse
from services.router.openai.unsupported import refuse_unsupported, unsupported
from services.router.served_model import ServedModel

# What an answer needs to know of its chat: whose it is, how tokens are named, what is looked for.
MakeChatAnswers = Callable[[AnswerHead, TokenNames, ReadingRules], AnswerFormat]

# nginx's word for "the client closed the connection"; nobody is there to read it.
CLIENT_CLOSED_REQUEST = 499


class Follower(Protocol):
    """Hears how far a request is, before it's answered."""

    def entered(self, generation: Generation) -> None:
        """It's valid, and in the queue."""
        ...

    def started(self) -> None:
        """Workers have it."""
        ...


class OpenAIApi:
    """Validates, generates, answers. Its errors are TandemErrors, which the app puts into words."""

    def __init__(
        self,
        *,
        model: ServedModel,
        encoder: PromptEncoder,
        structured_outputs: StructuredOutputs,
        chat_rules: ChatRules,
        dispatcher: Dispatcher,
        admission: AdmissionQueue,
        observer: TokenObserver,
        on_end: Callable[[Generation], None],
        max_body_bytes: int,
        request_timeout_s: float,
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._structured_outputs = structured_outputs
        self._chat_rules = chat_rules
        self._dispatcher = dispatcher
        self._admission = admission
        self._observer = observer
        self._on_end = on_end
        self.request_timeout_s = request_timeout_s
        self._chat_bodies = BodyReader(ChatBody, max_bytes=max_body_bytes)
        self._completion_bodies = BodyReader(CompletionBody, max_bytes=max_body_bytes)
        self._open: dict[str, OpenRequest] = {}

    @property
    def open_requests(self) -> Mapping[str, OpenRequest]:
        """Those that aren't over, by id."""
        return self._open

    @property
    def can_limit_thoughts(self) -> bool:
        return self._chat_rules.thoughts.can_limit

    async def chat(self, request: Request) -> Response:
        body = await self._chat_bodies.read(request)

        def make(head: AnswerHead, names: TokenNames, reading: ReadingRules) -> AnswerFormat:
            options = _options(body, logprobs=body.logprobs is True)
            return ChatAnswers(head, options, names, reading, echoed=_echoed(body))

        return await self.answer_chat(request, body, make, id_prefix="chatcmpl-")

    async def answer_chat(
        self,
        request: Request,
        body: ChatBody,
        make_answers: MakeChatAnswers,
        *,
        id_prefix: str,
        follower: Follower | None = None,
    ) -> Response:
        """A chat, answered in the form of whichever API the body comes from."""
        head = self._head(body, id_prefix)
        refuse_unsupported(body)
        sampling = chat_sampling(body, self._model.limits)
        thoughts = self._chat_rules.thoughts.read(body.thinking_token_budget)
        if thoughts is not None:
            sampling = msgspec.structs.replace(sampling, thoughts=thoughts)
        tools = self._chat_rules.tools.read(body)
        sampling, structure_field = await self._constrained(body, sampling, tools)
        prompt = await self._encoder.chat_prompt(body.messages, body, tools=tools.definitions)
        prompt = truncated(
            prompt,
            body.truncate_prompt_tokens,
            sampling,
            self._model.limits,
            side=body.truncation_side,
        )
        max_tokens = bounded_max_tokens(
            sampling, len(prompt.token_ids), self._model.limits, prompt_field="messages"
        )
        reading = self._chat_rules.reading(
            tools, sampling, shows_thoughts=body.include_reasoning is not False
        )
        spec = GenerationSpec(
            [prompt],
            [max_tokens],
            sampling,
            body.cache_salt,
            body.priority or 0,
            num_returned=body.n or 1,
            structure_field=structure_field,
            make_watch=reading.watch,
        )
        answers = make_answers(head, self._names(body), reading)
        stream = body.stream is True
        return await self.answer(request, spec, head, answers, stream=stream, follower=follower)

    async def count_prompt_tokens(self, body: ChatBody) -> int:
        """Of a chat as it would be sent to the model."""
        self._model.check_name(body.model)
        tools = self._chat_rules.tools.read(body)
        prompt = await self._encoder.chat_prompt(body.messages, body, tools=tools.definitions)
        return len(prompt.token_ids)

    async def completions(self, request: Request) -> Response:
        body = await self._completion_bodies.read(request)
        head = self._head(body, "cmpl-")
        refuse_unsupported(body)
        limits = self._model.limits
        if body.thinking_token_budget is not None:
            raise unsupported("thinking_token_budget")
        sampling = completion_sampling(body, limits)
        sampling, structure_field = await self._constrained(body, sampling)
        prompts = [
            truncated(
                prompt,
                body.truncate_prompt_tokens,
                sampling,
                limits,
                side=body.truncation_side,
            )
            for prompt in await self._encoder.prompts(
                body.prompt,
                field="prompt",
                add_special_tokens=body.add_special_tokens is not False,
            )
        ]
        if len(prompts) * sampling.n > MAX_PROMPTS:
            raise InvalidRequestError(
                f"A request may have at most {MAX_PROMPTS} outputs.", field="n"
            )
        max_tokens = [
            bounded_max_tokens(sampling, len(prompt.token_ids), limits, prompt_field="prompt")
            for prompt in prompts
        ]
        spec = GenerationSpec(
            prompts,
            max_tokens,
            sampling,
            body.cache_salt,
            body.priority or 0,
            num_returned=body.n or 1,
            is_prompt_only=is_prompt_only(body),
            structure_field=structure_field,
        )
        options = _options(body, echo=body.echo is True, logprobs=body.logprobs is not None)
        answers = CompletionAnswers(head, options, self._names(body), self._model.tokenizer)
        return await self.answer(request, spec, head, answers, stream=options.stream)

    async def answer(
        self,
        request: Request,
        spec: GenerationSpec,
        head: AnswerHead,
        answers: AnswerFormat,
        *,
        stream: bool = False,
        follower: Follower | None = None,
    ) -> Response:
        """Generates what `spec` says and has `answers` write it, whole or as a stream."""
        key = header(request.scope, b"authorization") or header(request.scope, b"x-api-key") or b""
        admission = self._admission.enter(
            client=key.decode("latin-1"),
            priority=spec.priority,
            num_sequences=spec.num_outputs,
        )
        generation = Generation(
            spec,
            request_id=head.id,
            dispatcher=self._dispatcher,
            tokenizer=self._model.tokenizer,
            observer=self._observer,
            timeout_s=self.request_timeout_s,
        )
        opened = OpenRequest(generation, admission, Client.of(request.scope), on_end=self._ended)
        self._open[head.id] = opened
        with opened:
            if follower is not None:
                follower.entered(generation)
            if await admission.granted():
                generation.start()
                if follower is not None:
                    follower.started()
            if stream:
                await generation.news()
            else:
                await generation.finished()
            if generation.aborted:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            if generation.error is not None:
                # Nothing is sent yet: this can still be a proper HTTP status.
                raise generation.error
            if not stream:
                return WholeAnswer(await answers.whole(generation), request_id=head.id)
            opened.keep()
        return EventStream(opened, answers)

    async def _constrained(
        self, body: SamplingBody, sampling: SamplingParams, tools: ToolUse = NO_TOOLS
    ) -> tuple[SamplingParams, str]:
        """`sampling` with what the output is held to, and the name of the field whose grammar that
        is, if there's one. Raises InvalidRequestError."""
        changes = token_constraints(body, self._model.limits, self._model.tokenizer)
        field = "structured_outputs"
        found = await self._structured_outputs.read(body, for_tools=tools.structure)
        if found is not None:
            field, changes["structured_outputs"] = found
        if tools.keeps_special_tokens:
            changes["skip_special_tokens"] = False
        return msgspec.structs.replace(sampling, **changes) if changes else sampling, field

    def _ended(self, generation: Generation) -> None:
        del self._open[generation.request_id]
        self._on_end(generation)
        generation.release()

    def _head(self, body: SamplingBody, prefix: str) -> AnswerHead:
        """Raises ModelNotFoundError."""
        model = self._model.check_name(body.model)
        return AnswerHead(f"{prefix}{secrets.token_hex(12)}", int(time.time()), model)

    def _names(self, body: SamplingBody) -> TokenNames:
        return TokenNames(self._model.tokenizer, as_ids=body.return_tokens_as_token_ids is True)


def _echoed(body: ChatBody) -> str:
    """What an answer begins with."""
    last = body.messages[-1]
    return (text_of(last) or "") if body.echo and last.role == "assistant" else ""


def _options(body: SamplingBody, *, logprobs: bool, echo: bool = False) -> AnswerOptions:
    stream_options = body.stream_options
    return AnswerOptions(
        stream=body.stream is True,
        include_usage=stream_options is not None and stream_options.include_usage is True,
        continuous_usage=stream_options is not None
        and stream_options.continuous_usage_stats is True,
        return_token_ids=body.return_token_ids is True,
        echo=echo,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs is not None,
    )
