"""Where a worker's share of a GPU goes, what is left for KV blocks, and what to say if it's too
little. Arithmetic alone; profiling.py measures."""

from dataclasses import dataclass

from protocol.errors import StartupError


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Bytes of one worker.

    Its share is a part of the card's total, whatever others use: workers whose shares add up to
    less than 1 fit beside each other, in whatever order they start. `activations_bytes` is what
    the largest step takes on top of the weights, logits and sampling included; `graphs_bytes`
    what captured CUDA graphs take; `outside_bytes` what torch knows nothing of.
    """

    utilization: float
    total_bytes: int
    weights_bytes: int
    activations_bytes: int
    graphs_bytes: int
    outside_bytes: int

    def __str__(self) -> str:
        return (
            f"--gpu-memory-utilization {self.utilization:g} of {gib(self.total_bytes)} allows "
            f"{gib(self.share_bytes)}; weights need {gib(self.weights_bytes)}, the largest step "
            f"{gib(self.activations_bytes)}, CUDA graphs {gib(self.graphs_bytes)}, CUDA itself "
            f"and transfers {gib(self.outside_bytes)}"
        )

    @property
    def share_bytes(self) -> int:
        return int(self.utilization * self.total_bytes)

    @property
    def own_bytes(self) -> int:
        """All but KV blocks."""
        return self.weights_bytes + self.activations_bytes + self.graphs_bytes + self.outside_bytes

    def kv_bytes(self) -> int:
        """What is left for KV blocks. Raises StartupError if nothing is."""
        if self.share_bytes <= self.own_bytes:
            least = self.own_bytes / self.total_bytes
            raise StartupError(
                f"{self}: {gib(self.own_bytes)} before any KV block. Allow more than {least:.3f}, "
                "lower --max-num-batched-tokens or --max-num-seqs, or leave CUDA graphs out with "
                "--enforce-eager."
            )
        return self.share_bytes - self.own_bytes


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
