"""Looks a request's headers up without making an object of them."""

from starlette.types import Scope


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this name, in lower case; None if there's none."""
    for key, value in scope["headers"]:
        if key == name:
            return value
    return None
