"""Every command and the configuration classes that it takes."""

from cli.resolve import Command, Group
from cli.stack_config import FetchConfig, RunBatchConfig, StackConfig
from cli.vllm_config import VllmConfig
from engine.config import EngineConfig
from loadtest.config import BenchConfig
from services.router.config import RouterConfig
from services.runtime.config import WorkerConfig

_ENGINE = Group(EngineConfig, "Model and engine")
_VLLM = Group(VllmConfig, "vLLM's flags that have one answer here")
_WORKER = Group(WorkerConfig, "Workers")

# The supervisor gives each process of its stack the settings that are left out here.
PER_WORKER = frozenset({"worker_id", "host", "control_port", "metrics_port"})
PER_ROUTER = frozenset({"fd"})

SERVE = Command(
    "serve",
    "Serve a model on this machine: Redis, routers, prefill and decode workers.",
    (
        Group(StackConfig, "Stack"),
        Group(RouterConfig, "Router", PER_ROUTER),
        _ENGINE,
        Group(WorkerConfig, "Workers", PER_WORKER),
        _VLLM,
    ),
    positional="model",
)
ROUTER = Command("router", "Run one router.", (Group(RouterConfig, "Router"),), positional="model")
_OF_A_WORKER = (_ENGINE, _WORKER, _VLLM)
PREFILL = Command("prefill", "Run one prefill worker.", _OF_A_WORKER, positional="model")
DECODE = Command("decode", "Run one decode worker.", _OF_A_WORKER, positional="model")
ENCODE = Command("encode", "Run one encode worker.", _OF_A_WORKER, positional="model")

BENCH = Command("bench", "Load an OpenAI-compatible server.", (Group(BenchConfig, "Load test"),))

FETCH = Command(
    "fetch",
    "Find, import or download a model, and print its directory.",
    (Group(FetchConfig, "Model"),),
    positional="model",
)

# Its stack is there for its own requests alone.
FOR_BATCH = frozenset({"fd", "host", "port", "api_key_file", "disable_log_requests"})
RUN_BATCH = Command(
    "run-batch",
    "Answer a file of requests, by a stack of its own or a running server.",
    (
        Group(RunBatchConfig, "Batch file"),
        Group(StackConfig, "Stack"),
        Group(RouterConfig, "Router", FOR_BATCH),
        _ENGINE,
        Group(WorkerConfig, "Workers", PER_WORKER),
        _VLLM,
    ),
    positional="model",
)

WITH_SETTINGS = (SERVE, ROUTER, PREFILL, DECODE, ENCODE, FETCH, BENCH, RUN_BATCH)
