"""vLLM's flags, so that one that isn't here is refused by name, with what to do instead."""

_NAMES = """
additional-config aggregate-engine-logging all2all-backend allow-credentials
allow-deprecated-quantization allowed-headers allowed-local-media-path allowed-media-domains
allowed-methods allowed-origins anthropic-disabled-thinking-effort api-key api-server-count
async-scheduling attention-backend attention-config aux-output-config block-size
chat-template chat-template-content-format code-revision cohere-format
cohere-is-reasoning-model collect-detailed-traces compilation-config config config-format
convert cp-kv-cache-interleave-size cpu-distributed-timeout-seconds cpu-offload-gb
cpu-offload-params cudagraph-capture-sizes cudagraph-metrics custom-histogram-buckets
data-parallel-address data-parallel-backend data-parallel-external-lb data-parallel-hybrid-lb
data-parallel-multi-port-external-lb data-parallel-rank data-parallel-rpc-port
data-parallel-size data-parallel-size-local data-parallel-start-rank
data-parallel-supervisor-port dbo-decode-token-threshold dbo-prefill-token-threshold
dcp-comm-backend dcp-kv-cache-interleave-size dcp-q-replicate decode-context-parallel-size
default-chat-template-kwargs default-mm-loras device-ids diffusion-config
disable-access-log-for-endpoints disable-cascade-attn disable-chunked-mm-input
disable-custom-all-reduce disable-fastapi-docs disable-hybrid-kv-cache-manager
disable-log-stats disable-nccl-for-dp-synchronization disable-sliding-window
disable-uvicorn-access-log distributed-executor-backend distributed-timeout-seconds
download-dir dp-supervisor-probe-failure-threshold dp-supervisor-probe-interval-s
dp-supervisor-probe-timeout-s dp-sync-interval dtype ec-manager-config ec-transfer-config
elastic-ep-max-dp-size enable-batch-sharded-sampling
enable-chunked-prefill enable-cumem-allocator enable-dbo enable-elastic-ep
enable-ep-weight-filter enable-eplb enable-expert-parallel enable-fault-tolerance
enable-flash-late-interaction enable-flashinfer-autotune enable-force-include-usage
enable-hc-sp enable-layerwise-nvtx-tracing enable-log-deltas enable-log-outputs
enable-log-requests enable-logging-iteration-details enable-lora
enable-mamba-cache-stochastic-rounding enable-mamba-shared-prefix-checkpoint
enable-mfu-metrics enable-mixed-moe-lora-format enable-mm-embeds enable-moe-shared-loras
enable-nccl-comm-suspend enable-offline-docs enable-per-request-metrics enable-prefix-caching
enable-prompt-embeds enable-prompt-tokens-details enable-request-id-headers
enable-return-routed-experts enable-scale-out enable-server-load-tracking
enable-shm-tensor-arena enable-sleep-mode enable-ssl-refresh enable-tokenizer-info-endpoint
enable-tower-connector-lora enable-trace-replay engram-config eplb-config
exclude-tools-when-tool-choice-none expert-placement-strategy fail-on-environ-validation
fault-tolerance-config fingerprint-mode fingerprint-value fully-sharded-loras
gdn-prefill-backend generation-config gpu-memory-utilization grpc grpc-port
h11-max-header-count h11-max-incomplete-event-size headless hf-config-path hf-overrides
hf-token host ignore-patterns interleave-mm-strings io-processor-plugin ir-op-priority
jit-monitor-mode jit-monitor-verbose json-arg kda-decode-backend kda-prefill-backend
kernel-config kv-cache-dtype kv-cache-dtype-skip-layers kv-cache-memory-bytes
kv-cache-metrics kv-cache-metrics-sample kv-events-config kv-offloading-backend
kv-offloading-size kv-sharing-fast-prefill kv-transfer-config language-model-only
limit-mm-per-prompt linear-backend load-format log-config-file log-error-stack log-level
logging-config logits-processors logprobs-mode long-prefill-token-threshold
long-prefill-token-threshold-adaptive lora-dtype lora-modules lora-target-modules
mamba-backend mamba-block-size mamba-cache-dtype mamba-cache-mode mamba-cache-philox-rounds
mamba-ssm-cache-dtype mamba-ssu-algorithm master-addr master-port max-cpu-loras
max-cudagraph-capture-size max-log-len max-logprobs max-lora-cls-labels max-lora-rank
max-loras max-model-len max-num-active-seqs max-num-batched-tokens max-num-queued-reqs
max-num-queued-tokens max-num-scheduled-tokens max-num-seqs max-parallel-loading-workers
media-io-kwargs middleware mm-device-do-normalize mm-encoder-attn-backend
mm-encoder-attn-dtype mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin
mm-encoder-fp8-scale-save-path mm-encoder-only mm-encoder-tp-mode mm-hasher-algorithm
mm-ipc-gpu-memory-gb mm-processor-cache-gb mm-processor-cache-type mm-processor-device
mm-processor-kwargs mm-shm-cache-max-object-size-mb mm-tensor-ipc model model-class-overrides
model-impl model-loader-extra-config moe-backend nnodes node-rank num-gpu-blocks-override
numa-bind numa-bind-cpus numa-bind-nodes offload-backend offload-group-size
offload-num-in-group offload-params offload-prefetch-step optimization-level
otlp-traces-endpoint override-generation-config per-request-spec-decode-metrics
performance-mode pipeline-parallel-size pooler-config port prefill-context-parallel-size
prefill-schedule-interval prefix-cache-retention-interval prefix-caching-hash-algo
prefix-match-unit profiler-config pt-load-map-location quantization quantization-config
ray-workers-use-nsight reasoning-config reasoning-parser-plugin
renderer-num-workers replayssm-buffer-len response-role return-sampling-mask
return-tokens-as-token-ids revision root-path runner safetensors-load-strategy
safetensors-prefetch-block-size safetensors-prefetch-num-threads scheduler-cls
scheduler-reserve-full-isl scheduling-policy seed served-model-name
show-hidden-metrics-for-version shutdown-timeout skip-mm-profiling skip-tokenizer-init
sleep-mode-offload-cudagraph sleep-preserve-parameter-names sparse-indexer-topk-backend
spec-method spec-model spec-tokens specialize-active-lora speculative-config
sse-keep-alive-interval ssl-ca-certs ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile
stream-interval structured-outputs-config swa-bounded-replay tensor-parallel-size tokenizer
tokenizer-mode tokenizer-revision tokens-only tool-parser-plugin tool-server
tool-strict-level trust-remote-code trust-request-chat-template trust-request-mm-kwargs
ubatch-size uds use-fp64-gumbel use-replayssm use-tqdm-on-load uvicorn-log-level
video-pruning-method video-pruning-rate watermark watermark-config weight-transfer-config
worker-cls worker-extension-cls
"""

# Those of earlier releases, which scripts still give.
_OLDER_NAMES = """
collect-detailed-traces disable-async-output-proc disable-frontend-multiprocessing
enable-prompt-adapter enable-reasoning engine-use-ray guided-decoding-disable-additional-properties
guided-decoding-disable-any-whitespace guided-decoding-disable-fallback logits-processor-pattern
long-lora-scaling-factors lora-extra-vocab-size max-context-len-to-capture
max-num-partial-prefills max-prompt-adapter-token max-prompt-adapters max-seq-len-to-capture
max-long-partial-prefills mm-cache-preprocessor multi-step-stream-outputs ngram-prompt-lookup-max
ngram-prompt-lookup-min num-lookahead-slots override-neuron-config override-pooler-config
qlora-adapter-name-or-path quantization-param-path rope-theta scheduler-delay-factor
spec-decoding-acceptance-method speculative-disable-by-batch-size
speculative-draft-tensor-parallel-size speculative-max-model-len task tokenizer-pool-size
tokenizer-pool-type use-v2-block-manager worker-use-ray
"""

_LEAVE_OUT = "leave it out"
_ALWAYS = "leave it out, as that is always so"
_PROXY = "a proxy in front can do that"
_IN_CONFIG = "write that into the config.json of the model's directory"
_MORE_WORKERS = "--prefill-workers and --decode-workers say how many replicas there are"
_WITH_MODEL = "it belongs in the model's directory"
_ADVICE = {
    "api-server-count": "--routers says how many processes take requests",
    "chat-template-content-format": "leave it out, as templates get contents as text",
    "convert": "--pooling-type says what is made of a text",
    "cpu-offload-gb": "a model must fit its device",
    "data-parallel-size": _MORE_WORKERS,
    "data-parallel-size-local": _MORE_WORKERS,
    "default-chat-template-kwargs": "requests bring their chat_template_kwargs",
    "download-dir": "HF_HOME says where models from the hub are kept",
    "enable-chunked-prefill": _ALWAYS,
    "enable-log-requests": "requests are logged when they end, unless --disable-log-requests",
    "enable-prompt-tokens-details": _ALWAYS,
    "enable-reasoning": "--reasoning-parser is enough",
    "enable-request-id-headers": _ALWAYS,
    "enable-server-load-tracking": _ALWAYS,
    "enable-force-include-usage": "requests say so in stream_options",
    "generation-config": "the model's generation_config.json is followed",
    "hf-overrides": _IN_CONFIG,
    "hf-token": "HF_TOKEN is read",
    "kv-transfer-config": "workers transfer KV by themselves; " + _MORE_WORKERS,
    "lora-modules": "merge the adapter into the model's weights",
    "max-logprobs": "requests may ask for 20",
    "max-num-queued-reqs": "it's --max-queued-requests here",
    "optimization-level": "--enforce-eager is all there is to choose",
    "otlp-traces-endpoint": "/metrics and the log say what becomes of requests",
    "override-generation-config": "write that into the model's generation_config.json",
    "pooler-config": "it's --pooling-type here",
    "quantization-config": "the checkpoint's own config.json is followed",
    "reasoning-config": "it's --reasoning-parser here",
    "revision": "fetch the revision that you want and name its directory",
    "root-path": _PROXY,
    "rope-theta": _IN_CONFIG,
    "runner": "what a model does is seen by its config.json",
    "scheduling-policy": "requests always go by their priority, then by their time",
    "shutdown-timeout": "it's --drain-timeout-s here",
    "spec-method": "speculative decoding isn't there; leave it out",
    "spec-model": "speculative decoding isn't there; leave it out",
    "spec-tokens": "speculative decoding isn't there; leave it out",
    "speculative-config": "speculative decoding isn't there; leave it out",
    "ssl-ca-certs": _PROXY,
    "ssl-certfile": _PROXY,
    "ssl-keyfile": _PROXY,
    "structured-outputs-config": "it's --guided-decoding-backend here",
    "task": "what a model does is seen by its config.json",
    "tokenizer": _WITH_MODEL,
    "tokenizer-mode": _WITH_MODEL,
    "trust-remote-code": "code that comes with a model is never run; leave it out",
    "use-v2-block-manager": _ALWAYS,
    "uvicorn-log-level": "it's --log-level here",
}

VLLM_FLAGS = frozenset(_NAMES.split()) | frozenset(_OLDER_NAMES.split())


def vllm_advice(key: str) -> str | None:
    """What to do about a flag of vLLM's that isn't here; None if vLLM hasn't it either.

    `key` is the flag without dashes in front; `a.b` is one field of `a`, as vLLM has it.
    """
    name = key.removeprefix("no-").split(".", 1)[0]
    return _ADVICE.get(name, _LEAVE_OUT) if name in VLLM_FLAGS else None
