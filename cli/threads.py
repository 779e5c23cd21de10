"""How many CPU threads each worker gets, and how its OpenMP threads wait for work."""

import os
from collections.abc import Mapping


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def threads_per_worker(num_cores: int, num_workers: int) -> int:
    """Threads of each of `num_workers` workers that share `num_cores` cores.

    One or two workers get every core: prefill and decode seldom compute at the same instant, and
    whichever runs alone should have the whole machine. From three on, cores are split.
    """
    if num_workers <= 2:
        return num_cores
    return max(1, -(-2 * num_cores // num_workers))


def openmp_environment(
    *, num_threads: int, num_workers: int, num_cores: int, environ: Mapping[str, str]
) -> dict[str, str]:
    """Variables for a worker process; what the operator has set in `environ` stays as it is.

    Threads that spin between parallel regions answer fast, but take the core from a neighbour:
    with more threads than cores they must sleep instead.
    """
    oversubscribed = num_threads * num_workers > num_cores
    wanted = {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE" if oversubscribed else "ACTIVE",
    }
    return {name: value for name, value in wanted.items() if name not in environ}
