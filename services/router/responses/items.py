"""The items that a response was made from, as they are kept and listed."""

import secrets
from collections.abc import Collection, Sequence
from typing import Any

import msgspec
from starlette.datastructures import QueryParams

from protocol.errors import InvalidRequestError
from services.router.openai.bodies import Message
from services.router.openai.unsupported import unsupported
from services.router.responses.bodies import InputItem, InputPart
from services.router.responses.input import ENCRYPTED_THOUGHTS, input_messages
from services.router.responses.store import StoredResponse

_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
# There are no images here, so that one asks for nothing.
INCLUDABLE = (ENCRYPTED_THOUGHTS, "message.input_image.image_url")


def said_items(record: StoredResponse) -> list[InputItem]:
    """The answer's own, which a conversation goes on behind."""
    output = msgspec.json.decode(record.answer, type=_Output).output
    # A call that was cut off has no arguments to go on with.
    said = [item for item in output if item["type"] != "function_call" or _is_whole(item)]
    return msgspec.convert(said, list[InputItem])


def conversation_of(record: StoredResponse) -> list[Message]:
    """All up to the answer, and with it."""
    before, said = record.input, said_items(record)
    messages = input_messages(before) if before else []
    return messages + (input_messages(said) if said else [])


def with_ids(given: str | Sequence[InputItem], *, taken: Collection[str]) -> list[InputItem]:
    """What a body's `input` says, as items that can be told apart."""
    if isinstance(given, str):
        given = [InputItem(role="user", content=given)]
    ids = set(taken)
    items: list[InputItem] = []
    for item in given:
        item_id = item.id
        if not item_id or item_id in ids:
            item_id = f"{_ID_PREFIXES.get(item.type, 'fco')}_{secrets.token_hex(12)}"
        ids.add(item_id)
        items.append(msgspec.structs.replace(item, id=item_id))
    return items


def listed(item: InputItem) -> dict[str, Any]:
    """As clients see it."""
    shown: dict[str, Any] = {"id": item.id, "type": item.type, "status": "completed"}
    match item.type:
        case "message":
            kind = "output_text" if item.role == "assistant" else "input_text"
            return shown | {"role": item.role, "content": _parts(item.content, kind)}
        case "reasoning":
            summary = _parts(item.summary, "summary_text")
            return shown | {"summary": summary, "content": _parts(item.content, "reasoning_text")}
        case "function_call":
            call = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
            return shown | call
        case _:
            output = item.output
            if output is not None and not isinstance(output, str):
                output = _parts(output, "input_text")
            return shown | {"call_id": item.call_id, "output": output}


def check_include(query: QueryParams) -> None:
    """Raises InvalidRequestError if more is wanted than is kept. Clients write lists either way."""
    for name in ("include", "include[]"):
        for wanted in query.getlist(name):
            if wanted not in INCLUDABLE:
                raise unsupported("include", f"To include {wanted[:60]!r} here")


def page_of(
    items: Sequence[InputItem], *, after: str | None, limit: int
) -> tuple[list[InputItem], bool]:
    """Those behind `after`, and whether more follow."""
    start = 0
    if after is not None:
        places = [i for i, item in enumerate(items) if item.id == after]
        if not places:
            raise InvalidRequestError(f"There is no `{after:.80}` in the list.", field="after")
        start = places[0] + 1
    return list(items[start : start + limit]), start + limit < len(items)


class _Output(msgspec.Struct):
    output: list[dict[str, Any]]


def _is_whole(item: dict[str, Any]) -> bool:
    return item["status"] == "completed"


def _parts(content: str | Sequence[InputPart] | None, kind: str) -> list[dict[str, Any]]:
    if content is None:
        return []
    if isinstance(content, str):
        content = [InputPart(type=kind, text=content)]
    return [_part(part) for part in content]


def _part(part: InputPart) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.to_builtins(part)
    return shown | {"annotations": []} if part.type == "output_text" else shown
