"""Lists that clients read page by page: which part they ask for, and OpenAI's form of one."""

from dataclasses import dataclass
from typing import Any

from starlette.datastructures import QueryParams

from protocol.errors import InvalidRequestError

_MAX_DIGITS = 20


@dataclass(frozen=True, slots=True)
class PageQuery:
    """Which part of a list a client asks for: `limit` records behind the one called `after`."""

    after: str | None
    limit: int
    ascending: bool = False


def read_page_query(query: QueryParams, *, default_limit: int, max_limit: int) -> PageQuery:
    """Raises InvalidRequestError that names the parameter."""
    text = query.get("limit", str(default_limit))
    # Python itself refuses to read a number of thousands of digits.
    is_number = text.isdecimal() and len(text) <= _MAX_DIGITS
    if not is_number or not 1 <= int(text) <= max_limit:
        raise InvalidRequestError(f"`limit` must be from 1 to {max_limit}.", field="limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError("`order` must be asc or desc.", field="order")
    return PageQuery(query.get("after"), int(text), ascending=order == "asc")


def list_answer(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """OpenAI's envelope of a page."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
