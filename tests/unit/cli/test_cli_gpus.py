"""Where a stack's workers run; the driver's program is played by a script."""

from pathlib import Path

import pytest

from cli.gpus import GpuPlace, describe, find_gpus, place

LISTED = """GPU-a, NVIDIA H100 80GB HBM3, 81559
GPU-b, NVIDIA T400 4GB, 4096
GPU-c, NVIDIA H100 80GB HBM3, 81559
"""


def install(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("num_workers", "share"), [(1, 0.9), (2, 0.45), (3, 0.3), (4, 0.225), (7, 0.128)]
)
def test_workers_of_one_gpu_share_its_memory(num_workers: int, share: float) -> None:
    here = GpuPlace(None, num_workers)
    assert here.memory_share(0.9) == pytest.approx(share)
    assert num_workers * here.memory_share(0.9) <= 0.9 + 1e-9


def test_those_of_the_largest_model_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, f"cat <<END\n{LISTED}END")
    assert find_gpus({}) == ["GPU-a", "GPU-c"]


@pytest.mark.parametrize(
    ("named", "gpus"),
    [
        ("2,0", ["2", "0"]),
        ("GPU-b", ["GPU-b"]),
        (" 1, 3 ", ["1", "3"]),
        ("0,-1,1", ["0"]),
        ("", []),
    ],
)
def test_those_that_are_named_win(named: str, gpus: list[str]) -> None:
    assert find_gpus({"CUDA_VISIBLE_DEVICES": named}) == gpus


@pytest.mark.parametrize(
    "script",
    ["exit 9", "echo 'NVIDIA-SMI has failed'", "echo 'GPU-a, odd, [N/A]'", "true"],
)
def test_without_a_working_driver_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    install(tmp_path, monkeypatch, script)
    assert find_gpus({}) == []


def test_without_a_driver_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus({}) == []


@pytest.mark.parametrize("gpus", [[], ["0"]])
def test_all_run_where_cuda_takes_them(gpus: list[str]) -> None:
    assert place(["prefill-0", "decode-0"], gpus) == {
        "prefill-0": GpuPlace(None, 2),
        "decode-0": GpuPlace(None, 2),
    }
    assert not GpuPlace(None, 2).environ
    assert describe(place(["decode-0"], gpus), gpus) is None


def test_workers_are_spread() -> None:
    workers, gpus = ["prefill-0", "decode-0", "decode-1"], ["GPU-a", "GPU-c"]
    places = place(workers, gpus)
    assert [places[worker].gpu for worker in workers] == ["GPU-a", "GPU-c", "GPU-a"]
    assert [places[worker].num_workers for worker in workers] == [2, 1, 2]
    assert places["decode-0"].environ == {"CUDA_VISIBLE_DEVICES": "GPU-c"}
    told = "prefill-0 on GPU 0, decode-0 on GPU 1, decode-1 on GPU 0"
    assert describe(places, gpus) == told
    apart = place(workers, ["0", "1", "2", "3"])
    assert [place.gpu for place in apart.values()] == ["0", "1", "2"]
    assert {place.num_workers for place in apart.values()} == {1}
