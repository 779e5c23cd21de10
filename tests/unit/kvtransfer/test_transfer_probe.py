"""What is said about a measured path."""

import msgspec

from kvtransfer.host import host_identity, is_same_host, measure_memcpy_gb_per_s
from kvtransfer.probe import PathRates, judge_path

HERE = host_identity()


def test_shared_memory_speed_raises_no_warning():
    rate = measure_memcpy_gb_per_s()
    report = judge_path("ucx", PathRates(rate, rate), HERE, HERE)
    assert report.same_host
    assert not report.is_slow_fallback
    assert report.warning is None
    assert report.gb_per_s == rate


def test_a_slow_path_between_containers_names_the_namespaces():
    there = msgspec.structs.replace(HERE, pid_namespace="pid:[1]", ipc_namespace="ipc:[1]")
    report = judge_path("ucx", PathRates(0.5, 0.1), HERE, there)
    assert report.is_slow_fallback
    assert report.warning is not None
    assert "separate PID namespaces and separate IPC namespaces" in report.warning


def test_a_slow_path_in_one_namespace_names_ucx_tls():
    report = judge_path("ucx", PathRates(0.5, 0.1), HERE, HERE)
    assert report.warning is not None
    assert "UCX_TLS" in report.warning


def test_processes_that_know_no_host_share_none():
    nowhere = msgspec.structs.replace(HERE, boot_id="")
    assert not is_same_host(nowhere, nowhere)
    assert is_same_host(HERE, HERE)


def test_a_slow_network_is_no_fallback():
    there = msgspec.structs.replace(HERE, boot_id="another")
    report = judge_path("ucx", PathRates(0.5, 0.1), HERE, there)
    assert not report.same_host
    assert report.warning is None
