"""Bytes that are no message, of each kind for which msgspec has an error of its own."""

NESTED_MSGPACK = b"\x81\xa6nested" + b"\x91" * 100_000
NESTED_JSON = b'{"nested":' + b"[" * 100_000

MARK = "MARK"
"""A text that a sound message has to have somewhere, for `without_utf8`."""


def without_utf8(sound: bytes) -> bytes:
    """The message with other bytes for its `MARK`, as many, that are no UTF-8."""
    assert MARK.encode() in sound
    return sound.replace(MARK.encode(), b"\xff" * len(MARK))
