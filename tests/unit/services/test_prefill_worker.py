"""A prefill worker's books, when what ends a request comes at once from two sides."""

import asyncio
from unittest.mock import Mock

from protocol.ids import RequestKey
from protocol.messages import AbortRequest, RunPrefill, StepOutputs
from protocol.request import PhaseTimings, Request, SequenceOutput
from protocol.sampling import SamplingParams
from services.prefill.loop import Abort, Command, PromptDone, Release, StartPrefill, TurnReport
from services.prefill.worker import PrefillWorker
from services.runtime.peers import Received
from services.runtime.tasks import TaskOwner

KEY = RequestKey("r", 1)
REQUEST = Request(
    key=KEY, token_ids=[1, 2, 3], num_prompt_tokens=3, sampling=SamplingParams(max_tokens=1)
)
FIRST = SequenceOutput(key=KEY, position=0, token_ids=[7], finish_reason="length")
DONE = TurnReport(done=[PromptDone(FIRST, PhaseTimings())])


class Bench:
    """A worker without network or engine: `posted` is what its engine thread would do."""

    def __init__(self) -> None:
        self.posted: list[Command] = []
        self.failures: list[BaseException] = []
        self.router = Mock()
        self.tasks = TaskOwner(on_failure=self.failures.append)
        self.worker = PrefillWorker(
            block_size=16,
            engine_thread=Mock(post=self.posted.append),
            links=Mock(),
            tasks=self.tasks,
            metrics=Mock(),
        )
        self.worker.on_channel(Received(self.router, RunPrefill(REQUEST, None)))

    async def settle(self) -> None:
        """Until its tasks have ended."""
        for _ in range(10):
            await asyncio.sleep(0)
        assert not self.failures
        assert self.worker.num_requests == 0
        await self.tasks.close()


async def test_a_prompt_that_is_through_is_released() -> None:
    bench = Bench()
    await asyncio.sleep(0)
    bench.worker.on_turn(DONE)
    await bench.settle()
    assert bench.posted == [StartPrefill(REQUEST), Release(KEY)]
    bench.router.send.assert_called_once_with(StepOutputs([FIRST]))


async def test_an_abort_just_as_the_prompt_is_through() -> None:
    """Its task is due, but hasn't had its turn: the abort gets in between."""
    bench = Bench()
    await asyncio.sleep(0)
    bench.worker.on_turn(DONE)
    bench.worker.on_channel(Received(bench.router, AbortRequest(KEY)))
    await bench.settle()
    assert bench.posted == [StartPrefill(REQUEST), Abort(KEY)]
