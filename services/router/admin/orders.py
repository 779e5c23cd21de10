"""What routers ask of each other when one of them was asked something that concerns all."""

from typing import TypeAlias

import msgspec

from protocol.ids import RequestId, RouterId


class AbortRequests(msgspec.Struct, frozen=True, tag=True):
    """End one request, or without an id all of them."""

    request_id: RequestId | None


class ReadSettings(msgspec.Struct, frozen=True, tag=True):
    """Redis has other settings than before."""


class CountRequests(msgspec.Struct, frozen=True, tag=True):
    """How many are under way?"""


Order: TypeAlias = AbortRequests | ReadSettings | CountRequests


class AbortedRequests(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[RequestId]


class SettingsRead(msgspec.Struct, frozen=True, tag=True):
    """`refusal` says why they can't be had here, if so: another version's router may know more."""

    refusal: str | None


class CountedRequests(msgspec.Struct, frozen=True, tag=True):
    num_open: int


OrderAnswer: TypeAlias = AbortedRequests | SettingsRead | CountedRequests


class OrderGiven(msgspec.Struct, frozen=True, tag=True):
    order_id: str
    order: Order


class OrderTaken(msgspec.Struct, frozen=True, tag=True):
    order_id: str
    router_id: RouterId
    answer: OrderAnswer


OrderMessage: TypeAlias = OrderGiven | OrderTaken
