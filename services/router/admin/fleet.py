"""All routers of the stack: which there are, and how one of them has all do something.

1. A router subscribes to the channel of orders, then says in Redis that it's there, and repeats it.
2. Who gives an order publishes it and reads in the same transaction who is there: all of those have
   subscribed before. It goes to all, the giver included.
3. Each router does it and publishes its answer. The giver waits until it has the answers of all;
   who dies meanwhile is gone from Redis before the deadline, and no longer waited for.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# redis-py leaves many arguments and results untyped.
import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from protocol.decoding import decode
from protocol.errors import UnreadableError
from protocol.ids import RouterId
from services.router.admin.orders import (
    Order,
    OrderAnswer,
    OrderGiven,
    OrderMessage,
    OrderTaken,
)
from services.router.http.errors import HttpError
from services.runtime.redis_client import REPLY_DEADLINE_S
from services.runtime.redis_keys import RedisKeys, member_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FleetTimings:
    """A dead router's presence ends, and that is seen, before the deadline of answers."""

    beat_s: float = 0.5
    presence_ttl_s: float = 3.0
    look_s: float = 0.25
    answers_deadline_s: float = 5.0
    subscribe_deadline_s: float = 1.0
    retry_s: float = 0.5


@dataclass(slots=True)
class _Awaited:
    """The answers to one order, as they come."""

    answers: dict[RouterId, OrderAnswer] = field(default_factory=dict[RouterId, OrderAnswer])
    news: asyncio.Event = field(default_factory=asyncio.Event)


class RouterFleet:
    """This router's place among all. Everything happens in the event loop."""

    def __init__(
        self,
        redis: Redis,
        take: Callable[[Order], Awaitable[OrderAnswer]],
        *,
        router_id: RouterId,
        keys: RedisKeys | None = None,
        timings: FleetTimings | None = None,
    ) -> None:
        """`take` does what this router is ordered; `router_id` is its own, in this life alone."""
        self._redis = redis
        self._take = take
        self._router_id = router_id
        self._keys = keys or RedisKeys()
        self._timings = timings or FleetTimings()
        self._subscribed = asyncio.Event()
        self._awaited: dict[str, _Awaited] = {}
        self._decoder = msgspec.msgpack.Decoder[OrderMessage](OrderMessage)

    @property
    def router_id(self) -> RouterId:
        return self._router_id

    @property
    def is_reachable(self) -> bool:
        """Whether orders come, as far as is known."""
        return self._subscribed.is_set()

    async def run(self) -> None:
        """Takes part until cancelled; an outage of Redis isn't an error here."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._again_and_again(self._listen))
            tasks.create_task(self._again_and_again(self._stay_present))

    async def withdraw(self) -> None:
        """Nobody need wait for this router any more; called after `run` was cancelled."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.srem(self._keys.routers, self._router_id)
        pipe.delete(self._keys.router(self._router_id))
        # Without that it expires.
        with contextlib.suppress(RedisError, OSError):
            async with asyncio.timeout(REPLY_DEADLINE_S):
                await pipe.execute()

    async def until_reachable(self) -> None:
        """Raises HttpError if no order can be given now: nothing has been done then."""
        try:
            async with asyncio.timeout(self._timings.subscribe_deadline_s):
                await self._subscribed.wait()
        except TimeoutError:
            raise redis_away("nothing was done") from None

    async def order(self, order: Order) -> dict[RouterId, OrderAnswer | None]:
        """What each router has answered; None from one that is there but silent.

        Raises HttpError if Redis can't pass it on.
        """
        await self.until_reachable()
        order_id = secrets.token_hex(8)
        awaited = self._awaited[order_id] = _Awaited()
        try:
            async with _reaching_redis():
                expected = await self._publish_order(OrderGiven(order_id, order))
                expected = await self._collect(awaited, expected)
        finally:
            del self._awaited[order_id]
        routers = sorted(expected | awaited.answers.keys())
        return {router_id: awaited.answers.get(router_id) for router_id in routers}

    async def _publish_order(self, message: OrderGiven) -> set[RouterId]:
        """Who has to answer."""
        pipe = self._redis.pipeline(transaction=True)
        pipe.smembers(self._keys.routers)
        pipe.publish(self._keys.orders, msgspec.msgpack.encode(message))
        async with asyncio.timeout(REPLY_DEADLINE_S):
            members, _ = await pipe.execute()
            return await self._present(map(member_id, members))

    async def _collect(self, awaited: _Awaited, expected: set[RouterId]) -> set[RouterId]:
        """Waits for the answers of all who stay there; returns who that is."""
        now = asyncio.get_running_loop().time
        end_s = now() + self._timings.answers_deadline_s
        while (missing := expected - awaited.answers.keys()) and now() < end_s:
            try:
                async with asyncio.timeout(self._timings.look_s):
                    await awaited.news.wait()
                awaited.news.clear()
            except TimeoutError:
                async with asyncio.timeout(REPLY_DEADLINE_S):
                    expected -= missing - await self._present(missing)
        return expected

    async def _present(self, router_ids: Iterable[RouterId]) -> set[RouterId]:
        """Those of them that are there, and always this one; the others' ids are cleared away."""
        others = sorted({*router_ids} - {self._router_id})
        if not others:
            return {self._router_id}
        values = await self._redis.mget([self._keys.router(each) for each in others])
        gone = [each for each, value in zip(others, values, strict=True) if value is None]
        if gone:
            await self._redis.srem(self._keys.routers, *gone)
        return {self._router_id, *others} - {*gone}

    async def _again_and_again(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except (RedisError, OSError):
                # The directory, which uses the same Redis, says it in the log.
                await asyncio.sleep(self._timings.retry_s)

    async def _clear_dead(self) -> None:
        """Who is killed leaves its id behind, for the next that starts."""
        async with asyncio.timeout(REPLY_DEADLINE_S):
            asked = cast("Awaitable[set[bytes]]", self._redis.smembers(self._keys.routers))
            await self._present(map(member_id, await asked))

    async def _stay_present(self) -> None:
        await self._subscribed.wait()
        await self._clear_dead()
        ttl_ms = round(1000 * self._timings.presence_ttl_s)
        while True:
            pipe = self._redis.pipeline(transaction=True)
            pipe.sadd(self._keys.routers, self._router_id)
            pipe.set(self._keys.router(self._router_id), b"", px=ttl_ms)
            async with asyncio.timeout(REPLY_DEADLINE_S):
                await pipe.execute()
            await asyncio.sleep(self._timings.beat_s)

    async def _listen(self) -> None:
        async with self._redis.pubsub() as pubsub:
            async with asyncio.timeout(REPLY_DEADLINE_S):
                await pubsub.subscribe(self._keys.orders)
                # The first message says that Redis has it.
                await pubsub.get_message(timeout=None)
            self._subscribed.set()
            try:
                while True:
                    message = await pubsub.get_message(timeout=self._timings.beat_s)
                    if message is not None and message["type"] == "message":
                        await self._heard(cast("bytes", message["data"]))
            finally:
                self._subscribed.clear()

    async def _heard(self, payload: bytes) -> None:
        try:
            message: OrderMessage = decode(self._decoder, payload)
        except UnreadableError as error:
            logger.warning("an order or answer of another router can't be read: %s", error)
            return
        match message:
            case OrderGiven(order_id, order):
                taken = OrderTaken(order_id, self._router_id, await self._take(order))
                async with asyncio.timeout(REPLY_DEADLINE_S):
                    await self._redis.publish(self._keys.orders, msgspec.msgpack.encode(taken))
            case OrderTaken(order_id, router_id, answer):
                awaited = self._awaited.get(order_id)
                if awaited is not None:
                    awaited.answers[router_id] = answer
                    awaited.news.set()


def silent(answers: dict[RouterId, OrderAnswer | None]) -> list[RouterId]:
    return [router_id for router_id, answer in answers.items() if answer is None]


def redis_away(outcome: str) -> HttpError:
    text = f"Redis, by which routers hear of each other, is out of reach: {outcome}."
    return HttpError(503, text, code="redis_unavailable")


@asynccontextmanager
async def _reaching_redis() -> AsyncGenerator[None]:
    try:
        yield
    except (RedisError, OSError) as error:
        logger.warning("an order to all routers failed: %s", error)
        raise redis_away("it isn't known which routers have heard of it; ask again") from error
