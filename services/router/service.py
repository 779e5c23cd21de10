"""A router process from start to end.

1. The model directory is found and its tokenizer read; then the HTTP socket is bound.
2. Redis says which workers there are; the control channel connects to each of them.
3. Requests are served: parsed (`http`), encoded and checked (`openai` and the other APIs), placed
   (`placement`), sent and tracked (`dispatch`), answered.
4. SIGTERM or SIGINT: no new connections, running requests get `drain_timeout_s`; a second signal
   ends them at once.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvloop
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from engine.grammar import backend_name
from engine.weights.model_dir import model_name, resolve_model
from protocol.errors import StartupError
from protocol.ids import new_incarnation
from protocol.messages import LoadReport, PrefixCacheReset, RequestFailed, StepOutputs
from services.router.admin.live_settings import LiveSettings, admission_policy
from services.router.admin.service import AdminService
from services.router.admin.status_api import StatusApi
from services.router.batch.service import BatchLimits, BatchService
from services.router.config import RouterConfig
from services.router.dispatch.admission import AdmissionQueue
from services.router.dispatch.dispatch import Dispatcher
from services.router.dispatch.flight import RetryPolicy
from services.router.embeddings.api import EmbeddingsApi
from services.router.http.app import Apis, make_app
from services.router.http.auth import keys_in_file
from services.router.http.server import make_server, open_listener
from services.router.messages.api import MessagesApi
from services.router.openai.api import OpenAIApi
from services.router.openai.prompts import PromptEncoder
from services.router.openai.reasoning_parsers import REASONING_FORMATS
from services.router.openai.structured_outputs import StructuredOutputs
from services.router.openai.thoughts import ThoughtPolicy
from services.router.openai.tool_choice import ChatRules, ToolPolicy
from services.router.placement.candidates import PlacementPolicy
from services.router.placement.cluster import Cluster, PlacementState
from services.router.placement.index import PrefixIndex
from services.router.placement.ledger import PlacementLedger
from services.router.placement.reservations import SharedReservations
from services.router.request_log import RequestReports
from services.router.responses.api import ResponsesApi
from services.router.responses.background import BackgroundRuns
from services.router.responses.kept_api import KeptResponsesApi
from services.router.responses.store import ResponseStore
from services.router.served_model import ServedModel
from services.router.stopping import Stopping
from services.runtime.channel import ControlChannel
from services.runtime.directory import WorkerDirectory
from services.runtime.kv_feed import KVFeed
from services.runtime.log import configure_logging
from services.runtime.peers import ChannelEvent, Identity, PeerDown, PeerUp, Received
from services.runtime.redis_client import open_redis
from services.runtime.router_metrics import RouterMetrics
from services.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

EXIT_FAULT = 1
ENCODER_THREADS = 2


def run_router(config: RouterConfig) -> int:
    """Serves until the process is told to stop; returns its exit code.

    Raises StartupError if the model, the address or a key file can't be had.
    """
    if config.redis_url is None:
        raise StartupError("A router needs --redis-url.")
    configure_logging(level=config.log_level, log_format=config.log_format)
    path = resolve_model(config.model)
    model = ServedModel.from_dir(
        path,
        names=config.served_model_name or (model_name(config.model),),
        chat_template=None if config.chat_template is None else Path(config.chat_template),
        guided_decoding_backend=config.guided_decoding_backend,
    )
    api_keys = config.api_key + keys_in_file(config.api_key_file)
    listener = open_listener(config)
    return uvloop.run(_serve(config, model, api_keys, listener))


class RouterService:
    """Everything of a router but the HTTP server; made inside the running event loop."""

    def __init__(
        self, config: RouterConfig, model: ServedModel, *, api_keys: tuple[str, ...] = ()
    ) -> None:
        assert config.redis_url is not None, "checked at the start"
        self._chat_rules = _chat_rules(config, model)
        self.failed = asyncio.Event()
        identity = Identity(f"router-{socket.gethostname()}-{os.getpid()}", new_incarnation())
        self._life_id = f"{identity.peer_id}-{identity.incarnation}"
        self._channel = ControlChannel(identity, self._on_channel)
        self._metrics = RouterMetrics(model_name=model.names[0])
        self._redis = open_redis(config.redis_url)
        placement = PlacementState(
            PrefixIndex(), PlacementLedger(), PlacementPolicy(local_prefill=config.local_prefill)
        )
        self._feed = KVFeed(self._redis, placement.index)
        self._reservations = SharedReservations(
            self._redis, placement.ledger, router_id=identity.peer_id
        )
        self.cluster = Cluster(
            self._channel, model, placement, self._feed, on_placed=self._metrics.placed
        )
        self._directory = WorkerDirectory(self._redis, self.cluster.records_came)
        retries = RetryPolicy(max_attempts=config.max_attempts)
        self.dispatcher = Dispatcher(self.cluster, self._channel.connect, policy=retries)
        self._admission = AdmissionQueue(self.cluster.capacity, admission_policy(config))
        self._settings = LiveSettings(config, self._adopt)
        self._tasks = TaskOwner(on_failure=self._fail)
        self._executor = ThreadPoolExecutor(ENCODER_THREADS, thread_name_prefix="encode")
        # Of their own, so that no prompt waits for a grammar that takes its time.
        self._grammar_executor = ThreadPoolExecutor(ENCODER_THREADS, thread_name_prefix="grammar")
        self._grammars = model.grammars
        self.app = self._make_app(config, model, api_keys)
        self.batches = BatchService(
            self.app.routes,
            self._redis,
            model,
            runner_id=self._life_id,
            limits=BatchLimits.of(config),
        )
        self.app.router.routes.extend(self.batches.routes)

    async def start(self) -> None:
        """Before it listens: then the first request finds the settings that all routers have."""
        self._tasks.start(self._directory.run())
        self._tasks.start(self._feed.run())
        self._tasks.start(self._reservations.run())
        self._tasks.start(self.batches.run())
        self._tasks.start(self._admin.run())
        await self._admin.read_settings()

    async def close(self) -> None:
        await self.background.close()
        self.dispatcher.close()
        await self._tasks.close()
        await self._admin.close()
        await self._channel.close()
        await self._redis.aclose()
        self._executor.shutdown(cancel_futures=True)
        self._grammars.close()
        self._grammar_executor.shutdown(cancel_futures=True)

    def _make_app(
        self, config: RouterConfig, model: ServedModel, api_keys: tuple[str, ...]
    ) -> FastAPI:
        log_requests = not config.disable_log_requests
        self._reports = RequestReports(self._metrics, log_requests=log_requests)
        encoder = PromptEncoder(
            model, self._executor, trusts_templates=config.trust_request_chat_template
        )
        self.structured_outputs = StructuredOutputs(
            model.grammars, self._grammar_executor, backend=config.guided_decoding_backend
        )
        self._openai = openai = OpenAIApi(
            model=model,
            encoder=encoder,
            structured_outputs=self.structured_outputs,
            chat_rules=self._chat_rules,
            dispatcher=self.dispatcher,
            admission=self._admission,
            observer=self._metrics,
            on_end=self._reports.ended,
            max_body_bytes=config.max_body_bytes,
            request_timeout_s=config.request_timeout_s,
        )
        self._admin = AdminService(
            self._redis,
            self._settings,
            router_id=self._life_id,
            open_requests=openai.open_requests,
            workers=lambda: self.cluster.peers,
        )
        store = ResponseStore(
            self._redis, ttl_s=config.response_ttl_s, max_bytes=config.response_store_bytes
        )
        self.background = BackgroundRuns(store, runner_id=self._life_id, on_failure=self._fail)
        responses = ResponsesApi(
            openai, store, self.background, encoder, max_body_bytes=config.max_body_bytes
        )
        kept_responses = KeptResponsesApi(store, self._admin.abort)
        embeddings = EmbeddingsApi(
            openai,
            model=model,
            encoder=encoder,
            pooling_type=model.pooling_for(config.pooling_type),
            max_body_bytes=config.max_body_bytes,
        )
        status = StatusApi(
            model=model,
            encoder=encoder,
            cluster=self.cluster,
            settings=self._settings.public,
            render_metrics=self._render_metrics,
            unready_reason=lambda: self.cluster.unready_reason() or self._admin.unready_reason,
            max_body_bytes=config.max_body_bytes,
        )
        messages = MessagesApi(openai, max_body_bytes=config.max_body_bytes)
        apis = Apis(openai, responses, kept_responses, messages, embeddings, status)
        app = make_app(
            apis,
            only_embeds=model.only_embeds,
            api_keys=api_keys,
            allowed_origins=config.allowed_origins,
        )
        app.router.routes.extend(self._admin.routes)
        return app

    def _adopt(self, config: RouterConfig) -> None:
        """Live settings have changed."""
        logging.getLogger().setLevel(config.log_level.upper())
        self._reports.log_requests = not config.disable_log_requests
        self._openai.request_timeout_s = config.request_timeout_s
        self._admission.policy = admission_policy(config)
        self.dispatcher.policy = RetryPolicy(max_attempts=config.max_attempts)
        self.cluster.adopt_policy(PlacementPolicy(local_prefill=config.local_prefill))

    def _render_metrics(self) -> tuple[bytes, str]:
        self._metrics.observe_workers(self.cluster.loads, self.cluster.count_states())
        self._metrics.observe_index(self.cluster.count_index_states())
        self._metrics.observe_queue(self._admission.num_waiting)
        return generate_latest(self._metrics.registry), CONTENT_TYPE_LATEST

    def _on_channel(self, event: ChannelEvent) -> None:
        match event:
            case PeerUp():
                self._admission.update()
            case PeerDown(peer, reason, detail):
                logger.warning("worker %s is gone: %s %s", peer.peer_id, reason, detail)
                self.cluster.peer_lost(peer)
                self.dispatcher.peer_lost(peer)
                self._admin.resets.peer_lost(peer)
            case Received(peer, StepOutputs() as message):
                self.dispatcher.outputs_came(peer, message)
            case Received(peer, LoadReport(load)):
                self.cluster.load_came(peer, load)
                self._admission.update()
            case Received(peer, RequestFailed() as message):
                self.dispatcher.request_failed(peer, message)
            case Received(peer, PrefixCacheReset() as message):
                self._admin.resets.answered(peer, message)
            case Received(peer, message):
                logger.warning("%s sent %s, which a router doesn't take", peer, message)

    def _fail(self, error: BaseException) -> None:
        logger.critical("ending after a fault", exc_info=error)
        self.failed.set()


async def _serve(
    config: RouterConfig, model: ServedModel, api_keys: tuple[str, ...], listener: socket.socket
) -> int:
    service = RouterService(config, model, api_keys=api_keys)
    server = make_server(service.app, drain_timeout_s=config.drain_timeout_s)
    stopping = Stopping(server, drain_timeout_s=config.drain_timeout_s)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.stop)
    await service.start()
    # Modules, vocabulary and routes live for ever: the collector need not walk them again.
    gc.collect()
    gc.freeze()
    # A request makes about as many objects as the default threshold, none of them in cycles.
    gc.set_threshold(20_000, 50, 100)
    failing = asyncio.create_task(service.failed.wait())
    failing.add_done_callback(lambda _: stopping.stop())
    logger.info(
        "serving %s on port %s, structured outputs by %s",
        model.names[0],
        listener.getsockname()[1],
        backend_name(config.guided_decoding_backend),
    )
    await server.serve(sockets=[listener])
    if not service.failed.is_set():
        await stopping.drain(service.background.until_idle())
    failing.cancel()
    await service.close()
    return EXIT_FAULT if service.failed.is_set() else 0


def _chat_rules(config: RouterConfig, model: ServedModel) -> ChatRules:
    """Raises StartupError."""
    if config.enable_auto_tool_choice and config.tool_call_parser is None:
        raise StartupError("--enable-auto-tool-choice needs --tool-call-parser.")
    parser = config.reasoning_parser
    make_thoughts = None if parser is None else REASONING_FORMATS[parser]
    return ChatRules(
        ToolPolicy.of(config.tool_call_parser, enable_auto=config.enable_auto_tool_choice),
        ThoughtPolicy(model.tokenizer, make_thoughts),
        make_thoughts,
    )
