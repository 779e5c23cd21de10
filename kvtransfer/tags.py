"""The 64-bit tag of a transport message.

    63                      30 29   28 27                     0
    +-------------------------+-------+-----------------------+
    | sender's tag namespace  | kind  | sequence number       |
    +-------------------------+-------+-----------------------+

The namespace is a random number that an agent draws at its birth, so a message of an earlier
incarnation can't be taken for one of the present; the receiver refuses a connection whose
namespace another live peer uses. Control messages need no number of their own. Data messages
count up per connection, and the header that announced a number says to which ticket, attempt
and blocks it belongs: a data message whose number no accepted header announced has no place to
go and is dropped.
"""

import secrets
from enum import IntEnum
from typing import NamedTuple

NAMESPACE_BITS = 34
KIND_BITS = 2
SEQUENCE_BITS = 28

SEQUENCE_MASK = (1 << SEQUENCE_BITS) - 1


class MessageKind(IntEnum):
    CONTROL = 0
    DATA = 1


class Tag(NamedTuple):
    namespace: int
    kind: MessageKind
    sequence: int


def new_namespace() -> int:
    return secrets.randbits(NAMESPACE_BITS)


def pack_tag(tag: Tag) -> int:
    return (
        tag.namespace << (KIND_BITS + SEQUENCE_BITS)
        | tag.kind << SEQUENCE_BITS
        | (tag.sequence & SEQUENCE_MASK)
    )


def unpack_tag(value: int) -> Tag | None:
    """None if the kind is unknown: then it's no message of ours."""
    kind = value >> SEQUENCE_BITS & ((1 << KIND_BITS) - 1)
    if kind > MessageKind.DATA:
        return None
    return Tag(value >> (KIND_BITS + SEQUENCE_BITS), MessageKind(kind), value & SEQUENCE_MASK)
