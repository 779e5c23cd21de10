"""How a process connects to the stack's Redis."""

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from protocol.errors import StartupError

# A local answer takes well under a millisecond; one that takes this long is an outage.
REPLY_DEADLINE_S = 5.0


def open_redis(url: str) -> Redis:
    """A client that connects on first use and reports a failure at once.

    It doesn't retry: what has to be repeated after an outage is known here, not in the client.
    Nor has it a `socket_timeout`: redis-py implements that by `asyncio.wait_for`, which in
    Python 3.11 loses a cancellation that comes together with the result, so tasks couldn't be
    ended. Callers set their own deadlines (REPLY_DEADLINE_S) by `asyncio.timeout`.

    Raises StartupError if the URL isn't one.
    """
    try:
        return Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
            url,
            socket_connect_timeout=1.0,
            socket_timeout=None,
            retry=Retry(NoBackoff(), 0),
            decode_responses=False,
        )
    except ValueError as error:
        raise StartupError(f"--redis-url {url!r} isn't a Redis URL: {error}") from error
