"""Metrics carry the names that dashboards use, and the page that lists them lists all."""

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Counter as CounterFamily
from prometheus_client import Histogram as HistogramFamily

from protocol.records import WorkerLoad
from protocol.request import PhaseTimings
from services.runtime.instruments import Counter, Histogram
from services.runtime.metrics import WorkerMetrics
from services.runtime.router_metrics import EndedRequest, RouterMetrics

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
LOAD = WorkerLoad(
    num_running=2,
    num_waiting=1,
    num_free_blocks=5,
    num_referenced_blocks=2,
    num_cached_blocks=2,
    num_quarantined_blocks=1,
    transfer_gb_per_s={"decode-0": 9.5},
)


def used_worker_metrics() -> WorkerMetrics:
    metrics = WorkerMetrics(model_name="m", worker_id="prefill-0")
    metrics.describe_pool(block_size=16, num_blocks=100)
    metrics.observe_load(LOAD)
    metrics.observe_tokens(num_prompt=7, num_generated=3, num_forced=2)
    metrics.observe_cache(num_queried=7, num_hit=4)
    metrics.observe_preemptions(1, num_swapped=2)
    metrics.observe_sent("decode-0", num_bytes=100, seconds=0.5)
    metrics.observe_received("prefill-1", num_bytes=50, seconds=0.25)
    metrics.observe_exposed_transfer(0.01)
    return metrics


def used_router_metrics() -> RouterMetrics:
    metrics = RouterMetrics(model_name="m")
    metrics.first_token(0.2)
    metrics.next_tokens(0.3, 3)
    metrics.phases(PhaseTimings(prefill_queue_s=0.1, prefill_s=0.2, decode_queue_s=0.3))
    metrics.request_ended(
        EndedRequest(
            finished_reason="stop",
            num_prompt_tokens=10,
            num_cached_tokens=4,
            num_output_tokens=5,
            num_longest_output_tokens=3,
            n=2,
            max_tokens=8,
            e2e_s=1.0,
            ttft_s=0.2,
            prefill_s=0.1,
        )
    )
    metrics.placed("remote")
    metrics.retried()
    metrics.observe_workers({"decode-0": LOAD}, {("decode", "alive"): 1})
    metrics.observe_index({"exact": 1})
    metrics.observe_queue(3)
    return metrics


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float:
    value = registry.get_sample_value(name, labels)
    assert value is not None, f"no sample {name} {labels}"
    return value


def test_a_worker_reports_its_load_and_its_transfers() -> None:
    registry = used_worker_metrics().registry
    worker = {"model_name": "m", "engine": "prefill-0"}
    assert sample(registry, "vllm:num_requests_running", **worker) == 2
    assert sample(registry, "vllm:kv_cache_usage_perc", **worker) == pytest.approx(0.3)
    states = ("free", "referenced", "cached", "quarantined")
    assert [sample(registry, "tandem:kv_blocks", **worker, state=s) for s in states] == [5, 2, 2, 1]
    assert sample(registry, "vllm:prompt_tokens_total", **worker) == 7
    assert sample(registry, "vllm:prefix_cache_hits_total", **worker) == 4
    assert sample(registry, "vllm:iteration_tokens_total_sum", **worker) == 10
    pool = {"block_size": "16", "num_gpu_blocks": "100"}
    assert sample(registry, "vllm:cache_config_info", **worker, **pool) == 1
    sent = "tandem:kv_transfer_sent_bytes_total"
    assert sample(registry, sent, **worker, peer="decode-0") == 100


def test_a_router_reports_what_clients_see() -> None:
    registry = used_router_metrics().registry
    assert sample(registry, "vllm:time_to_first_token_seconds_sum", model_name="m") == 0.2
    # Three tokens at once: three gaps that add up to the one measured.
    assert sample(registry, "vllm:inter_token_latency_seconds_count", model_name="m") == 3
    total = sample(registry, "vllm:inter_token_latency_seconds_sum", model_name="m")
    assert total == pytest.approx(0.3)
    finished = {"model_name": "m", "finished_reason": "stop"}
    assert sample(registry, "vllm:request_success_total", **finished) == 1
    assert sample(registry, "vllm:request_queue_time_seconds_sum", model_name="m") == 0.4
    assert sample(registry, "vllm:request_inference_time_seconds_sum", model_name="m") == (
        pytest.approx(0.9)
    )
    for name, value in (
        ("max_num_generation_tokens", 3),
        ("params_n", 2),
        ("params_max_tokens", 8),
    ):
        assert sample(registry, f"vllm:request_{name}_sum", model_name="m") == value
    phase = {"model_name": "m", "phase": "prefill"}
    assert sample(registry, "tandem:ttft_phase_seconds_sum", **phase) == 0.2
    assert sample(registry, "vllm:num_requests_running", model_name="m", engine="decode-0") == 2


def test_a_worker_that_left_is_no_longer_reported() -> None:
    metrics = used_router_metrics()
    metrics.observe_workers({}, {})
    gone = {"model_name": "m", "engine": "decode-0"}
    assert metrics.registry.get_sample_value("vllm:num_requests_running", gone) is None


# Of the queries in the dashboard that vLLM's repository brings (examples, prometheus_grafana), and
# of its predecessors.
DASHBOARD = """
vllm:e2e_request_latency_seconds_bucket vllm:e2e_request_latency_seconds_sum
vllm:e2e_request_latency_seconds_count vllm:prompt_tokens_total vllm:generation_tokens_total
vllm:time_per_output_token_seconds_bucket vllm:inter_token_latency_seconds_bucket
vllm:num_requests_running vllm:num_requests_waiting vllm:time_to_first_token_seconds_bucket
vllm:gpu_cache_usage_perc vllm:kv_cache_usage_perc vllm:request_prompt_tokens_bucket
vllm:request_generation_tokens_bucket vllm:request_success_total
vllm:request_queue_time_seconds_sum vllm:request_prefill_time_seconds_sum
vllm:request_decode_time_seconds_sum vllm:request_max_num_generation_tokens_sum
"""


def test_a_router_answers_all_that_the_dashboard_of_vllm_asks() -> None:
    families = used_router_metrics().registry.collect()
    samples = [sample for family in families for sample in family.samples]
    named = {sample.name for sample in samples if sample.labels["model_name"] == "m"}
    assert set(DASHBOARD.split()) <= named


def test_the_page_lists_every_metric_and_no_other() -> None:
    exported: set[str] = set()
    for registry in (used_worker_metrics().registry, used_router_metrics().registry):
        for family in registry.collect():
            exported.add(f"{family.name}_total" if family.type == "counter" else family.name)
    listed = set(re.findall(r"`((?:vllm|tandem):[a-z0-9_]+)`", PAGE.read_text()))
    assert listed == exported


def lines(registry: CollectorRegistry) -> list[str]:
    """What a scraper reads, but for the time of making."""
    text = generate_latest(registry).decode()
    return [re.sub(r"(_created{.*}) .*", r"\1", line) for line in text.splitlines()]


def test_a_histogram_says_what_prometheus_own_would() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bounds = (0.1, 1.0, 5.0)
    histogram = Histogram("h_seconds", "Text.", bounds, labels={"m": "x"}, registry=ours)
    family = HistogramFamily("h_seconds", "Text.", ("m",), buckets=bounds, registry=theirs)
    for amount in (0.0, 0.1, 0.25, 1.0, 7.5, 2.0, 2.0, 2.0):
        family.labels("x").observe(amount)
    for amount in (0.0, 0.1, 0.25, 1.0, 7.5):
        histogram.observe(amount)
    histogram.observe(2.0, 3)
    assert lines(ours) == lines(theirs)


def test_a_counter_says_what_prometheus_own_would() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counter = Counter("c", "Text.", labels={"m": "x"}, registry=ours)
    family = CounterFamily("c", "Text.", ("m",), registry=theirs)
    for amount in (1, 0, 41):
        counter.inc(amount)
        family.labels("x").inc(amount)
    assert lines(ours) == lines(theirs)
