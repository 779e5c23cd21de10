"""Where a stack's workers run; the driver's program is played by a script."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from cli.declarations import SERVE
from cli.gpus import Gpu, GpuPlace, describe, find_gpus, place
from cli.registered_workers import RegisteredWorkers
from cli.resolve import resolve
from cli.stack import Endpoints, worker_places, worker_services
from services.runtime.redis_client import open_redis

LISTED = """0, GPU-a1, 4096, [N/A]
1, GPU-b2, 81559, Disabled
2, GPU-c3, 81559, Disabled
3, GPU-d4, 98304, Disabled
"""
A, B, C = Gpu("GPU-a", "4"), Gpu("GPU-b", "5"), Gpu("2", "2")


def install(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, f"cat <<END\n{LISTED}END")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("num_workers", "share"), [(1, 0.9), (2, 0.45), (3, 0.3), (4, 0.225), (7, 0.128)]
)
def test_workers_of_one_gpu_share_its_memory(num_workers: int, share: float) -> None:
    here = GpuPlace(None, num_workers)
    assert here.memory_share(0.9) == pytest.approx(share)
    assert num_workers * here.memory_share(0.9) <= 0.9 + 1e-9


@pytest.mark.usefixtures("driver")
def test_all_but_small_ones_are_found() -> None:
    assert find_gpus({}) == [Gpu("GPU-b2", "1"), Gpu("GPU-c3", "2"), Gpu("GPU-d4", "3")]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("named", "names"),
    [
        ("2,0", ["2", "0"]),
        ("GPU-b", ["GPU-b"]),
        (" 1, 3 ", ["1", "3"]),
        ("MIG-x,MIG-y", ["MIG-x", "MIG-y"]),
        ("0,-1,1", ["0"]),
        ("3,4,1", ["3"]),
        ("GPU-e,GPU-b", []),
        ("G", []),
        ("", []),
    ],
)
def test_those_that_are_named_win_up_to_one_that_is_not_there(named: str, names: list[str]) -> None:
    assert find_gpus({"CUDA_VISIBLE_DEVICES": named}) == [Gpu(name, name) for name in names]


def test_where_instances_divide_gpus_the_choice_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, f"cat <<END\n{LISTED.replace('Disabled', 'Enabled', 1)}END")
    assert find_gpus({}) == []


@pytest.mark.parametrize(
    "script", ["exit 9", "echo 'NVIDIA-SMI has failed'", "echo '0, GPU-a, odd, [N/A]'", "true"]
)
@pytest.mark.parametrize("environ", [{}, {"CUDA_VISIBLE_DEVICES": "0,1"}])
def test_without_a_working_driver_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], script: str
) -> None:
    install(tmp_path, monkeypatch, script)
    assert find_gpus(environ) == []


def test_without_a_driver_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus({}) == []


@pytest.mark.parametrize("gpus", [[], [A]])
def test_all_run_where_cuda_takes_them(gpus: list[Gpu]) -> None:
    places = place(["prefill-0", "decode-0"], gpus)
    assert places == dict.fromkeys(("prefill-0", "decode-0"), GpuPlace(None, 2))
    assert not places["decode-0"].environ
    assert describe(places) is None


def test_workers_are_spread() -> None:
    workers = ["prefill-0", "decode-0", "decode-1"]
    places = place(workers, [A, B])
    assert [places[worker].gpu for worker in workers] == [A, B, A]
    assert [places[worker].num_workers for worker in workers] == [2, 1, 2]
    assert describe(places) == "prefill-0 on GPU 4, decode-0 on GPU 5, decode-1 on GPU 4"
    apart = place(workers, [A, B, C, C])
    assert [place.gpu for place in apart.values()] == [A, B, C]
    assert {place.num_workers for place in apart.values()} == {1}


@pytest.mark.usefixtures("driver")
def test_the_driver_is_asked_if_there_is_a_choice() -> None:
    workers = ["prefill-0", "decode-0"]
    places = worker_places(resolve(SERVE, []), workers)
    assert [place.gpu for place in places.values()] == [Gpu("GPU-b2", "1"), Gpu("GPU-c3", "2")]
    for flags, some in ((["--device", "cpu"], workers), ([], workers[:1])):
        places = worker_places(resolve(SERVE, flags), some)
        assert [place.gpu for place in places.values()] == [None] * len(some)


@pytest.mark.parametrize(
    ("flags", "shares"),
    [((), ["0.45", None, "0.45"]), (("--gpu-memory-utilization", "0.3"), ["0.3"] * 3)],
)
def test_workers_are_told(flags: Sequence[str], shares: list[str | None]) -> None:
    """Their GPU, and their share of it, which isn't named where it is a flag's default."""
    workers = ["prefill-0", "decode-0", "decode-1"]
    settings = resolve(SERVE, ["--gpu-sharing", "mps", *flags])
    specs = [
        service.spec
        for service in worker_services(
            settings,
            Endpoints("redis://", "localhost", 1),
            RegisteredWorkers(open_redis("redis://localhost")),
            {worker: worker for worker in workers},
            place(workers, [A, B]),
            {"MPS": "pipe"},
        )
    ]
    assert [spec.environ["CUDA_VISIBLE_DEVICES"] for spec in specs] == ["GPU-a", "GPU-b", "GPU-a"]
    # Only those that share a GPU run under MPS.
    assert [spec.environ.get("MPS") for spec in specs] == ["pipe", None, "pipe"]
    limits = [spec.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE") for spec in specs]
    assert limits == ["100", None, None]
    flag = "--gpu-memory-utilization="
    told = [[arg for arg in spec.argv if arg.startswith(flag)] for spec in specs]
    assert told == [[] if share is None else [flag + share] for share in shares]
