"""What kind of GPU a device is, by what its driver says."""

from types import SimpleNamespace

import pytest
import torch

from kernels.gpu.cards import has_fast_memory


@pytest.mark.parametrize(
    ("clock_khz", "bus_bits", "is_fast"),
    [(2_619_000, 5120, False), (3_201_000, 6016, True)],
    ids=["H100", "H200"],
)
def test_memory(
    monkeypatch: pytest.MonkeyPatch, clock_khz: int, bus_bits: int, *, is_fast: bool
) -> None:
    properties = SimpleNamespace(memory_clock_rate=clock_khz, memory_bus_width=bus_bits)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert has_fast_memory.__wrapped__(torch.device("cuda")) == is_fast


def test_a_cpu_is_no_card() -> None:
    assert not has_fast_memory(torch.device("cpu"))
