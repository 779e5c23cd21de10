"""What a device does while a call runs, by torch's profiler."""

from collections import Counter
from collections.abc import Callable

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

DEVICE = DeviceType.CUDA
# The first that a kernel's name holds says what it does.
KINDS = (
    ("layer_kernel", "layers' products"),
    ("attention", "attention"),
    ("decode_kernel", "attention"),
    # FlashAttention 3's; they name CUTLASS, too.
    ("flash", "attention"),
    ("widen_blocks", "blocks widened"),
    ("gather_blocks", "blocks gathered"),
    ("saturate_rows", "quantization"),
    ("rotated_fp8", "RoPE, store"),
    ("silu_and_mul", "SiLU · mul"),
    ("rope", "RoPE, store"),
    ("norm", "add, norm"),
    ("quantize", "quantization"),
    ("nvjet", "products"),
    ("gemm", "products"),
    ("cutlass", "products"),
    ("linear", "products"),
    ("choose", "sampling"),
)


Span = tuple[float, float, str]
"""Start, end (µs) and name of a kernel or copy."""


def device_spans(call: Callable[[], object]) -> list[Span]:
    """All kernels and copies of a call, by their start."""
    # Of one cycle there is nothing to accumulate, but without it some torch releases warn.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
    # The host's calls to the driver are events, too, and a wait for the device lasts long.
    events = [event for event in profiler.events() if event.device_type == DEVICE]
    return sorted((event.time_range.start, event.time_range.end, event.name) for event in events)


def idle_share(spans: list[Span]) -> float:
    """For which share of the time from the first to the last kernel or copy the device has none."""
    return _idle_us(spans) / (max(end for _, end, _ in spans) - spans[0][0])


def kernel_ms(spans: list[Span]) -> dict[str, float]:
    """Milliseconds of each kind of kernel, and of nothing; most first. Those that start before
    their predecessor has ended wait meanwhile, and that counts, too."""
    kinds: Counter[str] = Counter()
    for start, end, name in spans:
        kinds[_kind_of(name)] += end - start
    kinds["nothing"] = _idle_us(spans)
    return {kind: round(microseconds / 1e3, 2) for kind, microseconds in kinds.most_common()}


def _kind_of(kernel: str) -> str:
    return next((kind for part, kind in KINDS if part in kernel.lower()), "other")


def _idle_us(spans: list[Span]) -> float:
    idle, until = 0.0, spans[0][0]
    for start, end, _ in spans:
        idle += max(0.0, start - until)
        until = max(until, end)
    return idle
