"""Does a receiver survive its senders' deaths? Kills them amid writes, again and again.

    PYTHONPATH=.:tests/contract python -m benchmarks.transfer.kill_senders \\
        --kills 100 --output benchmarks/results/transfer-kills.json

Each round starts a sender, lets it write its whole pool over and over, kills it after a few
writes, and lets the next one write to the same receiver. A receiver that no write reaches any more
for `STALL_S` has been blocked by a dead sender, and ends the run. Several such runs at once make
the machine busy, which is when it came.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

from transfer_process import NUM_BLOCKS, TransferProcess

STALL_S = 15.0
LONGEST_DELAY_S = 0.01


def kill_senders(num_kills: int, generator: random.Random) -> int:
    """Kills survived by one receiver."""
    incarnations = itertools.count(1)
    receiver = TransferProcess.start("d", next(incarnations), "host")
    try:
        for ticket_id in range(1, num_kills + 1):
            sender = TransferProcess.start("p", next(incarnations), "host")
            sender.connect_to(receiver)
            receiver.call("expect", ticket_id, sender.incarnation, list(range(NUM_BLOCKS)))
            wanted = receiver.call("num_received") + 1 + generator.randrange(4)
            sender.call("start_writing", receiver.incarnation, ticket_id)
            reached = _reaches(receiver, wanted)
            if reached and generator.random() < 0.3:
                time.sleep(generator.random() * LONGEST_DELAY_S)
            sender.kill()
            if not reached:
                return ticket_id - 1
            receiver.call("drop", "p", sender.incarnation)
            receiver.call("close_ticket", ticket_id)
    finally:
        receiver.kill()
    return num_kills


def _reaches(receiver: TransferProcess, num_writes: int) -> bool:
    deadline_s = time.monotonic() + STALL_S
    while receiver.call("num_received") < num_writes:
        if time.monotonic() > deadline_s:
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    start_s = time.monotonic()
    num_survived = kill_senders(arguments.kills, random.Random(arguments.seed))
    git = ("git", "rev-parse", "HEAD")
    result = {
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "num_cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "kills": arguments.kills,
        "survived": num_survived,
        "is_blocked": num_survived < arguments.kills,
        "seconds": round(time.monotonic() - start_s, 1),
    }
    print(json.dumps(result))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
