"""What bodies of /v1/responses and /v1/messages share with a chat's, and how errors name the rest.

Both become a `ChatBody`, so that everything behind it is the same for all three.
"""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from protocol.errors import InvalidRequestError, TandemError
from services.router.openai.bodies import SharedFields

ValueT = TypeVar("ValueT")


def shared_fields(body: SharedFields) -> dict[str, Any]:
    return {name: getattr(body, name) for name in SharedFields.__struct_fields__}


@contextmanager
def fields_named(names: Mapping[str, str]) -> Generator[None]:
    """Errors inside name fields as this API does. `names` are patterns and what to put there."""
    try:
        yield
    except InvalidRequestError as error:
        raise renamed(error, names) from error


def renamed(error: TandemError, names: Mapping[str, str]) -> TandemError:
    """As inside `fields_named`."""
    if not isinstance(error, InvalidRequestError):
        return error
    message = re.sub(r"`([^`]+)`", lambda found: f"`{_named(found[1], names)}`", error.message)
    field = None if error.field is None else _named(error.field, names)
    return InvalidRequestError(message, field=field, code=error.code)


def _named(field: str, names: Mapping[str, str]) -> str:
    for pattern, name in names.items():
        field, count = re.subn(rf"^{pattern}(?![A-Za-z0-9_])", name, field)
        if count:
            break
    return field


def required(value: ValueT | None, field: str) -> ValueT:
    """For what is optional in some uses of a type, but not in this one."""
    if value is None:
        raise InvalidRequestError(
            f"`{field}` is required.", field=field, code="missing_required_parameter"
        )
    return value
