"""A router with no-op workers, in a thread of its own: what is done to it can't stop a test."""

import asyncio
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from router_stack import RouterStack, open_router_stack, until

JOIN_S = 60.0
IDLE_S = 15.0


class StackThread:
    """Runs a prefill and a decode worker behind a router; `settings` are RouterConfig's."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self._path = path
        self._settings = settings
        self._ready: Future[RouterStack] = Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.stack = self._ready.result(JOIN_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(JOIN_S)
        assert not self._thread.is_alive(), "the router doesn't end"

    @property
    def address(self) -> tuple[str, int]:
        return self.stack.address

    def leftovers(self) -> dict[str, int]:
        """What requests hold; all zero when none is under way and no client is connected."""
        service = self.stack.service
        return {
            "flights": service.dispatcher.num_flights,
            "waiting": service._admission.num_waiting,
            "admitted": service._admission.num_admitted,
            "placed": len(service.cluster._ledger._places),
            "sequences": sum(worker.num_running for worker in self.stack.workers),
            "connections": self._num_connections(),
            "tasks": max(0, len(asyncio.all_tasks(self._loop)) - self._num_tasks),
        }

    def _num_connections(self) -> int:
        """Those that the router hasn't let go of."""
        held = (psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)
        _, port = self.address
        connections = psutil.Process().net_connections("tcp4")
        return sum(c.laddr.port == port and c.status in held for c in connections)

    def wait_idle(self) -> None:
        """Until nothing is left of any request; fails with what stays."""
        end_s = time.monotonic() + IDLE_S
        while any(self.leftovers().values()):
            assert time.monotonic() < end_s, f"left behind: {self.leftovers()}"
            time.sleep(0.02)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            async with open_router_stack(self._path, **self._settings) as stack:
                await stack.add_worker("prefill")
                await stack.add_worker("decode")
                await until(lambda: stack.service.cluster.unready_reason() is None)
                self._num_tasks = len(asyncio.all_tasks())
                self._ready.set_result(stack)
                await self._stop.wait()
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            raise
