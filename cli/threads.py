"""How many CPU threads each worker gets, and how its OpenMP threads wait for work."""

import os
from collections.abc import Mapping

# libgomp's busy-waiting rounds before a thread sleeps.
SHORT_SPIN_ROUNDS = "1000"


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
    *, num_threads: int, is_crowded: bool, environ: Mapping[str, str]
) -> dict[str, str]:
    """Variables for a worker process; what the operator has set in `environ` stays as it is.

    OpenMP's threads spin between parallel regions. Alone on its cores that is right: a decode step
    has a few hundred regions, and each would pay for a wake-up. Where workers have more threads
    than there are cores (`is_crowded`), long spins starve the neighbour: a step of 32 sequences
    took 150 to 420 ms beside a busy one, and 52 ms with a short spin that bridges the gaps inside
    a step and gives the core away between steps.
    """
    wanted = {"OMP_NUM_THREADS": str(num_threads)}
    if is_crowded:
        wanted["GOMP_SPINCOUNT"] = SHORT_SPIN_ROUNDS
    return {name: value for name, value in wanted.items() if name not in environ}
