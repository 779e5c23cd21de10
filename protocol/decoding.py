"""Decodes what another process or a client has written, whatever that is."""

from typing import Protocol, TypeVar

import msgspec

from protocol.errors import UnreadableError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# What msgspec quotes may be as long as what was sent, and have line breaks.
_MAX_TEXT = 300


class Decoder(Protocol[T_co]):
    """msgspec's, for MessagePack or JSON."""

    def decode(self, data: bytes | bytearray, /) -> T_co: ...


def decode(decoder: Decoder[T], data: bytes | bytearray) -> T:
    """Raises UnreadableError, in one line; its cause is what msgspec has raised."""
    try:
        return decoder.decode(data)
    # Text that is no UTF-8, and nesting without end, have errors of their own.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise UnreadableError(text[:_MAX_TEXT]) from error
