"""What the profiler's events are taken for, over real ones: a CPU's, since there need be no GPU."""

from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import device_time

SPANS = [
    (0.0, 10.0, "_hopper_attention_kernel"),
    (8.0, 14.0, "nvjet_sm90_tst"),
    (20.0, 25.0, "_add_rms_norm_fp8_kernel"),
    (22.0, 24.0, "Memcpy HtoD"),
    (30.0, 40.0, "_decode_kernel"),
]
# As the profiler calls them.
FLASH_ATTENTION = "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...> > >"
GATHERING = "_gather_blocks_kernel"


def profiled_on_cpu(activities: list[ProfilerActivity], *, acc_events: bool) -> profile:
    assert activities == [ProfilerActivity.CUDA]
    return profile(activities=[ProfilerActivity.CPU], acc_events=acc_events)


@pytest.mark.parametrize("device", [DeviceType.CPU, DeviceType.CUDA])
def test_events_of_the_device_alone(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    monkeypatch.setattr(device_time, "profile", profiled_on_cpu)
    monkeypatch.setattr(device_time, "DEVICE", device)
    spans = device_time.device_spans(lambda: torch.ones(10).sum())
    assert any("sum" in name for _, _, name in spans) == (device == DeviceType.CPU)
    assert all(start <= end for start, end, _ in spans)


def test_time_of_nothing() -> None:
    assert device_time.idle_share(SPANS) == pytest.approx(11 / 40)


def test_kinds_of_kernels() -> None:
    spans = [(1e3 * start, 1e3 * end, name) for start, end, name in SPANS]
    assert device_time.kernel_ms(spans) == {
        "attention": 20.0,
        "nothing": 11.0,
        "products": 6.0,
        "add, norm": 5.0,
        "other": 2.0,
    }
    kinds = device_time.kernel_ms([(0.0, 5e3, GATHERING), (5e3, 9e3, FLASH_ATTENTION)])
    assert kinds == {"blocks gathered": 5.0, "attention": 4.0, "nothing": 0.0}
