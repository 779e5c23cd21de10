"""Names of workers, requests and their generations."""

import secrets
from enum import StrEnum
from typing import TypeAlias

import msgspec

RequestId: TypeAlias = str
WorkerId: TypeAlias = str
RouterId: TypeAlias = str
TicketId: TypeAlias = int

# One life of one process. A restarted worker keeps its WorkerId and gets a new incarnation,
# so whatever its predecessor sent, promised or cached can be told apart and refused.
Incarnation: TypeAlias = int


def new_incarnation() -> Incarnation:
    """A random non-zero 63-bit number; two lives of a worker never share one in practice."""
    return secrets.randbits(62) + 1


class WorkerRole(StrEnum):
    """A model that only embeds has encode workers, and no others."""

    PREFILL = "prefill"
    DECODE = "decode"
    ENCODE = "encode"


class RequestKey(msgspec.Struct, frozen=True, array_like=True):
    """A request's identity on a worker: the router's id and which try at it this is."""

    request_id: RequestId
    attempt: int


class WorkerRef(msgspec.Struct, frozen=True):
    """One incarnation of one worker and where to reach its control socket (a ZMQ endpoint)."""

    worker_id: WorkerId
    incarnation: Incarnation
    control_address: str
