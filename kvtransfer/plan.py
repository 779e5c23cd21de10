"""How a list of blocks becomes messages: long runs as they are, short ones gathered."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvtransfer.region import Run

# A run takes up to 11 bytes in a header and a message up to 9 more; see wire.MAX_HEADER_BYTES.
MAX_RUNS_PER_MESSAGE = 256
MAX_RUNS_PER_PART = 512
MAX_PER_PART = 128
# Of two packed ids each; see wire.MAX_CONTROL_BYTES. Of blocks of 64 KiB, a card copies as many in
# the time that it takes to announce and start the next copy.
MAX_BLOCKS_PER_READ = 4096


@dataclass(frozen=True, slots=True)
class PlannedMessage:
    """Blocks that travel together; sender and receiver walk their own runs in the same order."""

    src_runs: tuple[Run, ...]
    dst_runs: tuple[Run, ...]

    @property
    def num_blocks(self) -> int:
        return sum(count for _, count in self.src_runs)


@dataclass(frozen=True, slots=True)
class MessageLimits:
    """Sizes in blocks, each at least 1.

    Runs (contiguous on both sides) of fewer than `gather_below` blocks are put together into
    messages of up to `gathered` blocks; longer ones are cut at `direct`.
    """

    direct: int
    gather_below: int
    gathered: int


def plan_messages(
    src_blocks: Sequence[int], dst_blocks: Sequence[int], limits: MessageLimits
) -> list[PlannedMessage]:
    """Messages that together move `src_blocks[i]` to `dst_blocks[i]` for every i."""
    messages: list[PlannedMessage] = []
    gathering: list[tuple[int, int, int]] = []
    num_gathered = 0

    def flush() -> None:
        nonlocal num_gathered
        if gathering:
            messages.append(
                PlannedMessage(
                    src_runs=_merged((src, count) for src, _, count in gathering),
                    dst_runs=_merged((dst, count) for _, dst, count in gathering),
                )
            )
            gathering.clear()
            num_gathered = 0

    for src, dst, count in _common_runs(src_blocks, dst_blocks):
        if count >= limits.gather_below:
            messages.extend(
                PlannedMessage(((src + at, size),), ((dst + at, size),))
                for at in range(0, count, limits.direct)
                for size in (min(limits.direct, count - at),)
            )
            continue
        if num_gathered + count > limits.gathered or len(gathering) == MAX_RUNS_PER_MESSAGE:
            flush()
        gathering.append((src, dst, count))
        num_gathered += count
    flush()
    return messages


def split_into_parts(messages: Sequence[PlannedMessage]) -> list[list[PlannedMessage]]:
    """Groups small enough for one header each; at least one group, which may be empty."""
    parts: list[list[PlannedMessage]] = [[]]
    num_runs = 0
    for message in messages:
        size = len(message.dst_runs)
        if parts[-1] and (num_runs + size > MAX_RUNS_PER_PART or len(parts[-1]) == MAX_PER_PART):
            parts.append([])
            num_runs = 0
        parts[-1].append(message)
        num_runs += size
    return parts


def runs_of(block_ids: Sequence[int]) -> tuple[Run, ...]:
    """The same blocks in the same order, neighbours joined."""
    return _merged((block_id, 1) for block_id in block_ids)


def _common_runs(
    src_blocks: Sequence[int], dst_blocks: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """(first source, first destination, count) of pieces contiguous on both sides."""
    start = 0
    for end in range(1, len(src_blocks) + 1):
        if (
            end < len(src_blocks)
            and src_blocks[end] == src_blocks[end - 1] + 1
            and dst_blocks[end] == dst_blocks[end - 1] + 1
        ):
            continue
        yield src_blocks[start], dst_blocks[start], end - start
        start = end


def _merged(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Joins neighbours, so that a side that is contiguous needs no copy."""
    merged: list[Run] = []
    for first, count in runs:
        if merged and sum(merged[-1]) == first:
            merged[-1] = (merged[-1][0], merged[-1][1] + count)
        else:
            merged.append((first, count))
    return tuple(merged)
