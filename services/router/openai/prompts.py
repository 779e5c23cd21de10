"""From a body's prompt or messages to token ids."""

import asyncio
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

import msgspec

from engine.tokenizer import ChatTemplate
from protocol.errors import ContextLengthError, InvalidRequestError, StartupError
from protocol.sampling import SamplingParams
from services.router.openai.bodies import ChatBody, Message, Side, TokenizeBody
from services.router.openai.sampling import SamplingLimits, check_token_ids
from services.router.openai.template_input import template_messages, template_options
from services.router.served_model import ServedModel

MAX_PROMPTS = 2048
# A shorter text is encoded in less time than it takes to hand it to a thread.
_INLINE_CHARS = 2048
_INLINE_MESSAGES = 64
# Of several texts, as many as a thread takes at once, some 30 ms; others' texts wait meanwhile.
_PORTION_CHARS = 64 * 1024
# An encoder's tokens don't cover its text: any number of spaces is none, an unknown word is one.
_SPARSE = 16
_MAX_TEMPLATE_CHARS = 64 * 1024
_MAX_TEMPLATES = 64

ResultT = TypeVar("ResultT")


class Prompt(msgspec.Struct, frozen=True):
    """`text` is None where the client sent token ids."""

    text: str | None
    token_ids: list[int]


class PromptEncoder:
    """Makes prompts; long texts are encoded in `executor`, so that nobody else waits for them."""

    def __init__(
        self, model: ServedModel, executor: Executor, *, trusts_templates: bool = False
    ) -> None:
        """`trusts_templates` lets requests bring chat templates of their own."""
        self._model = model
        self._executor = executor
        self._trusts_templates = trusts_templates
        self._compiled = functools.lru_cache(maxsize=_MAX_TEMPLATES)(self._compile)

    @property
    def max_chars(self) -> int:
        """Of a text that is worth encoding: a longer one has too many tokens."""
        num_chars = self._model.limits.max_model_len * self._model.tokenizer.max_token_chars
        return num_chars * (_SPARSE if self._model.only_embeds else 1)

    async def prompts(
        self, texts: str | list[str | int | list[int]], *, field: str, add_special_tokens: bool
    ) -> list[Prompt]:
        """At least one prompt, none of them empty. Raises InvalidRequestError."""
        given = split_prompt(texts, field)
        is_quick = _num_chars(given) <= _INLINE_CHARS
        prompts: list[Prompt] = []
        for portion in _portions(given):
            encode = functools.partial(
                self._prompts, portion, field, add_special_tokens=add_special_tokens
            )
            prompts += await self._run(encode, is_quick=is_quick)
        return prompts

    async def chat_prompt(
        self,
        messages: Sequence[Message],
        options: ChatBody | TokenizeBody,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        field: str = "messages",
    ) -> Prompt:
        """Raises InvalidRequestError if the messages are wrong or the template refuses them."""
        chat = template_messages(messages)
        source = options.chat_template
        if source is not None:
            self._check_template(source)
        render = template_options(options) | {"tools": tools}
        add_special_tokens = options.add_special_tokens is True

        def encode() -> Prompt:
            template = None if source is None else self._compiled(source)
            text = self._model.tokenizer.render_chat(chat, template=template, **render)
            return Prompt(text, self._encode(text, field, add_special_tokens=add_special_tokens))

        return self._checked(await self._run(encode, is_quick=_is_quick(chat, options)), field)

    async def text_prompt(self, text: str, *, field: str, add_special_tokens: bool) -> Prompt:
        """A text's tokens, maybe none."""

        def encode() -> Prompt:
            return Prompt(text, self._encode(text, field, add_special_tokens=add_special_tokens))

        return await self._run(encode, is_quick=len(text) <= _INLINE_CHARS)

    def _prompts(
        self, given: Sequence[str | list[int]], field: str, *, add_special_tokens: bool
    ) -> list[Prompt]:
        prompts: list[Prompt] = []
        for each in given:
            if isinstance(each, str):
                token_ids = self._encode(each, field, add_special_tokens=add_special_tokens)
                prompts.append(self._checked(Prompt(each, token_ids), field))
            else:
                check_token_ids(each, self._model.limits.vocab_size, field=field)
                prompts.append(self._checked(Prompt(None, each), field))
        return prompts

    def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        max_model_len = self._model.limits.max_model_len
        if len(text) > self.max_chars:
            # Not worth encoding: it takes longer the more hopeless it is.
            raise ContextLengthError(
                f"This model's maximum context length is {max_model_len} tokens; "
                f"a text of {len(text)} characters has more.",
                field=field,
            )
        return self._model.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _check_template(self, source: str) -> None:
        if not self._trusts_templates:
            raise InvalidRequestError(
                "`chat_template` isn't accepted from requests; the server's operator can allow it "
                "with --trust-request-chat-template.",
                field="chat_template",
                code="unsupported_parameter",
            )
        if len(source) > _MAX_TEMPLATE_CHARS:
            raise InvalidRequestError(
                f"`chat_template` may have at most {_MAX_TEMPLATE_CHARS} characters.",
                field="chat_template",
            )

    def _compile(self, source: str) -> ChatTemplate:
        try:
            special_tokens = self._model.tokenizer.special_tokens
            return ChatTemplate(source, special_tokens, field="chat_template")
        except StartupError as error:
            raise InvalidRequestError(f"`chat_template`: {error}", field="chat_template") from error

    async def _run(self, encode: Callable[[], ResultT], *, is_quick: bool) -> ResultT:
        if is_quick:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._executor, encode)

    def _checked(self, prompt: Prompt, field: str) -> Prompt:
        """Raises InvalidRequestError for one that no worker could take."""
        if not prompt.token_ids:
            raise InvalidRequestError(f"`{field}` must have at least one token.", field=field)
        vocab_size = self._model.limits.vocab_size
        # Some tokenizers have marks that their model was never given embeddings for.
        if self._model.tokenizer.num_ids > vocab_size and max(prompt.token_ids) >= vocab_size:
            name = self._model.tokenizer.token_name(max(prompt.token_ids))
            raise InvalidRequestError(
                f"`{field}` has a token that this model doesn't know: {name!r:.80}.", field=field
            )
        return prompt


def _is_quick(chat: Sequence[Mapping[str, Any]], options: ChatBody | TokenizeBody) -> bool:
    """Whether it's a few short texts, and no more. A template of somebody else's may take its time,
    and so may what others say of tools, documents and the like."""
    if options.chat_template or options.tools or options.documents or options.chat_template_kwargs:
        return False
    if len(chat) > _INLINE_MESSAGES or any("tool_calls" in message for message in chat):
        return False
    return sum(len(text) for message in chat if (text := message["content"])) <= _INLINE_CHARS


def _num_chars(prompts: Sequence[str | list[int]]) -> int:
    return sum(len(prompt) for prompt in prompts if isinstance(prompt, str))


def _portions(prompts: Sequence[str | list[int]]) -> Iterator[Sequence[str | list[int]]]:
    """`prompts` in order, each portion but the last with `_PORTION_CHARS` or a little more."""
    first = num_chars = 0
    for end, prompt in enumerate(prompts, 1):
        num_chars += len(prompt) if isinstance(prompt, str) else 0
        if num_chars >= _PORTION_CHARS or end == len(prompts):
            yield prompts[first:end]
            first, num_chars = end, 0


def truncated(
    prompt: Prompt,
    num_tokens: int | None,
    sampling: SamplingParams,
    limits: SamplingLimits,
    *,
    side: Side | None = None,
) -> Prompt:
    """The prompt's last `num_tokens` tokens, or its first where `side`, which is cut, is the right;
    -1 is as many as leave room for the output.

    Raises InvalidRequestError for a number that makes no sense.
    """
    if num_tokens is None:
        return prompt
    if num_tokens == -1:
        num_tokens = max(1, limits.max_model_len - (sampling.max_tokens or 1))
    elif not 1 <= num_tokens <= limits.max_model_len:
        raise InvalidRequestError(
            f"`truncate_prompt_tokens` must be -1 or between 1 and {limits.max_model_len}, "
            f"got {num_tokens}.",
            field="truncate_prompt_tokens",
        )
    if len(prompt.token_ids) <= num_tokens:
        return prompt
    if side == "right":
        return Prompt(None, prompt.token_ids[:num_tokens])
    return Prompt(None, prompt.token_ids[-num_tokens:])


def split_prompt(
    prompt: str | list[str | int | list[int]], field: str = "prompt"
) -> list[str | list[int]]:
    """The prompts in a completion's `prompt`. Raises InvalidRequestError for a mixed list."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequestError(f"`{field}` must not be an empty list.", field=field)
    token_ids = [item for item in prompt if isinstance(item, int)]
    if len(token_ids) == len(prompt):
        return [token_ids]
    prompts = [item for item in prompt if not isinstance(item, int)]
    if len({type(item) for item in prompt}) != 1:
        raise InvalidRequestError(
            f"`{field}` must be a string, strings, token ids or lists of token ids, not a mixture.",
            field=field,
            code="invalid_type",
        )
    if len(prompts) > MAX_PROMPTS:
        raise InvalidRequestError(
            f"`{field}` may hold at most {MAX_PROMPTS} prompts, got {len(prompts)}.", field=field
        )
    return prompts
