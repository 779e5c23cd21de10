"""Files and batches of a router, put together."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from redis.asyncio import Redis
from starlette.routing import BaseRoute, Route

from services.router.batch.batches_api import BatchesApi
from services.router.batch.files import FileStore
from services.router.batch.files_api import FilesApi
from services.router.batch.in_process import Endpoint, InProcessApi
from services.router.batch.lines import BATCH_ENDPOINTS
from services.router.batch.run import LeaseTimings, RunContext
from services.router.batch.runner import BatchRunner
from services.router.batch.store import BatchStore
from services.router.config import RouterConfig
from services.router.served_model import ServedModel
from services.runtime.redis_keys import RedisKeys

# How batches appear among the clients that the admission queue is fair to.
_CLIENT = "batches"


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What batches may take: room for files, and a share of the workers."""

    max_file_bytes: int
    file_ttl_s: int
    max_lines_at_once: int
    priority: int

    @classmethod
    def of(cls, config: RouterConfig) -> "BatchLimits":
        return cls(
            max_file_bytes=config.max_file_bytes,
            file_ttl_s=config.file_ttl_s,
            max_lines_at_once=config.batch_concurrency,
            priority=config.batch_priority,
        )


class BatchService:
    """`routes` are to be added to the app, `run` keeps batches going."""

    def __init__(
        self,
        routes: Sequence[BaseRoute],
        redis: Redis,
        model: ServedModel,
        *,
        runner_id: str,
        limits: BatchLimits,
        lease: LeaseTimings | None = None,
    ) -> None:
        """`routes` are those of the API; a batch's lines go to their endpoints.

        `runner_id` must be this process's alone, in this life.
        """
        keys = RedisKeys()
        api = InProcessApi(dict(_batch_endpoints(routes)), client=_CLIENT)
        files = FileStore(redis, keys, ttl_s=limits.file_ttl_s)
        self.store = BatchStore(redis, keys, runner_id=runner_id, ttl_s=limits.file_ttl_s)
        self._runner = BatchRunner(
            RunContext(
                store=self.store,
                files=files,
                api=api,
                model=model,
                slots=asyncio.Semaphore(limits.max_lines_at_once),
                priority=limits.priority,
                lease=lease or LeaseTimings(),
            )
        )
        self._files = FilesApi(files, max_file_bytes=limits.max_file_bytes)
        self._batches = BatchesApi(
            self.store, files, endpoints=api.paths, on_created=self._runner.wake
        )

    @property
    def routes(self) -> list[Route]:
        files, batches = self._files, self._batches
        return [
            Route("/v1/files", files.create, methods=["POST"]),
            Route("/v1/files", files.list, methods=["GET"]),
            Route("/v1/files/{file_id}", files.get, methods=["GET"]),
            Route("/v1/files/{file_id}", files.delete, methods=["DELETE"]),
            Route("/v1/files/{file_id}/content", files.content, methods=["GET"]),
            Route("/v1/batches", batches.create, methods=["POST"]),
            Route("/v1/batches", batches.list, methods=["GET"]),
            Route("/v1/batches/{batch_id}", batches.get, methods=["GET"]),
            Route("/v1/batches/{batch_id}/cancel", batches.cancel, methods=["POST"]),
        ]

    def wake(self) -> None:
        """`store` has a new batch."""
        self._runner.wake()

    async def run(self) -> None:
        """Until cancelled."""
        await self._runner.run()


def _batch_endpoints(routes: Sequence[BaseRoute]) -> Iterator[tuple[str, Endpoint]]:
    for route in routes:
        if isinstance(route, Route) and route.path in BATCH_ENDPOINTS:
            yield route.path, route.endpoint
