"""What the API says to one request of a batch, whichever way it was asked, with patience."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 10.0
# A request on which workers die must not go on killing them.
_MAX_WORKERS_LOST = 3


@dataclass(frozen=True, slots=True)
class Answer:
    """`status` is HTTP's."""

    status: int
    body: bytes


async def patient_answer(ask: Callable[[], Awaitable[Answer]]) -> Answer:
    """The first answer that doesn't say "later": too many requests, or no worker at the moment."""
    pause_s, num_lost = _FIRST_PAUSE_S, 0
    while True:
        answer = await ask()
        num_lost += b'"worker_lost"' in answer.body
        if answer.status not in (429, 503) or num_lost >= _MAX_WORKERS_LOST:
            return answer
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
