"""From a chat's messages to what its template is given."""

from collections.abc import Sequence
from typing import Any

import msgspec

from protocol.errors import InvalidRequestError
from services.router.openai.bodies import ChatBody, ContentPart, Message, TokenizeBody

MAX_MESSAGES = 16_384


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checked messages as the template sees them."""
    if not messages:
        raise InvalidRequestError("`messages` must not be empty.", field="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(
            f"`messages` may hold at most {MAX_MESSAGES} messages, got {len(messages)}.",
            field="messages",
        )
    for i, message in enumerate(messages):
        _check_message(message, f"messages[{i}]")
    return [_template_message(message) for message in messages]


def template_options(body: ChatBody | TokenizeBody) -> dict[str, Any]:
    """Options of `ChatTemplate.render`. Raises InvalidRequestError if two contradict."""
    continues = body.continue_final_message is True
    if continues and body.add_generation_prompt:
        raise InvalidRequestError(
            "`continue_final_message` and `add_generation_prompt` exclude each other.",
            field="continue_final_message",
        )
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        # Some templates know how hard to think, others only whether to.
        variables["reasoning_effort"] = body.reasoning_effort
        variables.setdefault("enable_thinking", body.reasoning_effort != "none")
    return {
        "add_generation_prompt": body.add_generation_prompt is not False and not continues,
        "continue_final_message": continues,
        "documents": body.documents,
        "variables": variables,
    }


def _check_message(message: Message, path: str) -> None:
    if not message.role:
        raise InvalidRequestError(f"`{path}.role` must not be empty.", field=f"{path}.role")
    if message.content is None and message.role != "assistant":
        raise InvalidRequestError(
            f"`{path}.content` is required.",
            field=f"{path}.content",
            code="missing_required_parameter",
        )
    if isinstance(message.content, list):
        for j, part in enumerate(message.content):
            if part.type not in ("text", "input_text", "output_text", "refusal"):
                raise InvalidRequestError(
                    f"`{path}.content[{j}]` has type {part.type[:40]!r}; "
                    "this model takes text only.",
                    field=f"{path}.content[{j}].type",
                )
            if _part_text(part) is None:
                name = "refusal" if part.type == "refusal" else "text"
                raise InvalidRequestError(
                    f"`{path}.content[{j}].{name}` is required.",
                    field=f"{path}.content[{j}].{name}",
                    code="missing_required_parameter",
                )


def _template_message(message: Message) -> dict[str, Any]:
    """As templates want it, which know the older name of thoughts."""
    fields = msgspec.to_builtins(message) | {"content": text_of(message)}
    thoughts = fields.pop("reasoning", None)
    return fields if thoughts is None else {"reasoning_content": thoughts, **fields}


def text_of(message: Message) -> str | None:
    """A checked message's content; parts are put on lines of their own."""
    if isinstance(message.content, list):
        return "\n".join(_part_text(part) or "" for part in message.content)
    return message.content


def _part_text(part: ContentPart) -> str | None:
    return part.refusal if part.type == "refusal" else part.text
