"""Renders conversations by a model's own Jinja template, sandboxed, as transformers does."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from protocol.errors import InvalidRequestError, StartupError

# A stranger's template can be nested, can call itself, and can write what no parser reads.
_PARSER_FAILURES = (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError)
_TEMPLATE_FAILURES = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError),
    *(AttributeError, RecursionError, MemoryError),
)
_END_OF_CONTENT = "\ue000TANDEM-END-OF-CONTENT\ue001"


class ChatTemplate:
    """A compiled chat template.

    `special_tokens` (`bos_token` …) are visible to the template by their names. `field` is what of
    a request is wrong if the template fails; it's the template itself where that came with it.
    Raises StartupError if `source` isn't a Jinja template.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, field: str = "messages"
    ) -> None:
        self._field = field
        self._special_tokens = dict(special_tokens)
        # A template that never heard of this role would drop the message or mislabel it.
        self._knows_developer_role = "developer" in source
        try:
            template = self._template = _make_environment().from_string(source)
        except _PARSER_FAILURES as error:
            raise StartupError(f"The chat template can't be parsed: {error}.") from error
        # They come as a chain of dicts, which each rendering would walk through twice.
        template.globals = dict(template.globals)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the text that the model is prompted with.

        A message's content is text, None, or a list of `{"type": "text", "text": …}` parts.
        `continue_final_message` leaves the last message open, so that the model goes on with it.
        `variables` are further names for the template (`chat_template_kwargs`).
        Raises InvalidRequestError if the template refuses the conversation.
        """
        chat = [self._prepare(message) for message in messages]
        if continue_final_message:
            chat[-1]["content"] += _END_OF_CONTENT
        names = self._special_tokens | {
            "messages": chat,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(dict(variables or {}) | names)
        except _TEMPLATE_FAILURES as error:
            whose = "The model's chat template" if self._field == "messages" else f"`{self._field}`"
            raise InvalidRequestError(
                f"{whose} refuses these messages: {error}", field=self._field
            ) from error
        return _cut_at_end_of_content(text) if continue_final_message else text

    def _prepare(self, message: Mapping[str, Any]) -> dict[str, Any]:
        prepared = dict(message)
        prepared["content"] = flatten_content(message.get("content"))
        if prepared.get("role") == "developer" and not self._knows_developer_role:
            prepared["role"] = "system"
        if calls := message.get("tool_calls"):
            prepared["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
        return prepared


def flatten_content(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """A message's content as one text; the texts of several parts are put on lines of their own."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content)


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The API carries a call's arguments as JSON text; templates want the object itself."""
    function = dict(call.get("function") or {})
    if isinstance(arguments := function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"A tool call's `arguments` aren't valid JSON: {error}.", field="messages"
            ) from error
    return {**call, "function": function}


def _cut_at_end_of_content(text: str) -> str:
    end = text.rfind(_END_OF_CONTENT)
    if end < 0:
        raise InvalidRequestError(
            "The model's chat template drops the final message, so it can't be continued.",
            field="continue_final_message",
        )
    return text[:end]


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's part for training; here it's transparent."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    return environment


def _to_json(
    value: Any,  # noqa: ANN401  (whatever a template has)
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  (transformers' signature)
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Jinja's own filter escapes HTML, which a model would see."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)  # noqa: DTZ005  (templates mean the local date)
