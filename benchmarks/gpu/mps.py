"""NVIDIA's Multi-Process Service for as long as a benchmark runs: kernels of several processes at
once on one card, instead of in turns. Needs no right that a user lacks, and changes no setting."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory


@contextmanager
def shared_by_mps(*, is_wanted: bool) -> Iterator[None]:
    """Processes that are started within use MPS; without `is_wanted` nothing happens."""
    if not is_wanted:
        yield
        return
    with TemporaryDirectory() as directory:
        own = {"CUDA_MPS_PIPE_DIRECTORY": directory, "CUDA_MPS_LOG_DIRECTORY": directory}
        os.environ.update(own)
        subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True)
        try:
            yield
        finally:
            subprocess.run(
                ["nvidia-cuda-mps-control"], input="quit\n", text=True, check=False, timeout=30
            )
            for name in own:
                del os.environ[name]
