"""NVIDIA's Multi-Process Service: kernels of several workers at once on one card.

Without it the driver lets processes of one card take turns of some milliseconds, and a decode step
waits for the prompts' turn. The control daemon needs no right that a user lacks, and changes no
setting of the card. The stack's guardian ends it (cli/runtime_dir.py).
"""

import os
import shutil
import subprocess
from pathlib import Path

from cli.gpus import VARIABLE
from protocol.errors import StartupError

_CONTROL = "nvidia-cuda-mps-control"
_START_TIMEOUT_S = 30.0


def start_mps(directory: Path) -> dict[str, str]:
    """Starts the daemon, its sockets and logs in `directory`, which is made for it.

    Returns the variables that make a process use it. Raises StartupError if it can't be started.
    """
    if shutil.which(_CONTROL) is None:
        raise StartupError(
            f"--gpu-sharing mps needs {_CONTROL}, which comes with NVIDIA's driver; it isn't here."
        )
    directory.mkdir()
    own = {"CUDA_MPS_PIPE_DIRECTORY": str(directory), "CUDA_MPS_LOG_DIRECTORY": str(directory)}
    try:
        started = subprocess.run(
            [_CONTROL, "-d"],
            # Workers name their GPUs; the daemon would count those that it is limited to anew.
            env={name: os.environ[name] for name in os.environ if name != VARIABLE} | own,
            capture_output=True,
            text=True,
            check=False,
            timeout=_START_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise StartupError(
            f"--gpu-sharing mps: {_CONTROL} doesn't start within {_START_TIMEOUT_S:.0f} s."
        ) from error
    if started.returncode != 0:
        said = (started.stderr or started.stdout).strip().rpartition("\n")[2]
        raise StartupError(f"--gpu-sharing mps: {_CONTROL} doesn't start: {said}")
    return own


def mps_share(percentage: int) -> dict[str, str]:
    """What keeps a process to its share of the card's multiprocessors."""
    return {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percentage)}
