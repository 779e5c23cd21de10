"""Writes that this process makes itself, by reading a sender's pool that is mapped here."""

from kvtransfer.block_ids import BlockIds, unpack_block_ids
from kvtransfer.checksum import checksum_error
from kvtransfer.fence import FenceTable
from kvtransfer.incoming_write import IncomingWrite, IncomingWrites, WriteSource
from kvtransfer.plan import runs_of
from kvtransfer.pool_reader import PoolReader
from kvtransfer.region import Region
from kvtransfer.wire import ReadPart
from protocol.errors import TransferError


class IncomingReads:
    """Each part of a write becomes one copy, which starts when the part has come."""

    def __init__(
        self,
        region: Region,
        fences: FenceTable,
        writes: IncomingWrites,
        *,
        verify_checksums: bool,
    ) -> None:
        self._region = region
        self._fences = fences
        self._writes = writes
        self._verify_checksums = verify_checksums

    def on_part(self, source: WriteSource, part: ReadPart) -> None:
        """Starts to copy blocks from the sender's pool, or refuses the write."""
        reader = source.reader
        if reader is None:
            self._writes.refuse(source, part.write_id, "the sender's pool is not mapped here")
            return
        try:
            src_ids, dst_ids = _pairs(part, reader)
        except TransferError as error:
            self._writes.refuse(source, part.write_id, str(error))
            return
        write = self._writes.accept(source, part, lambda fence: fence.refusal_of_blocks(dst_ids))
        if write is None:
            return
        if len(dst_ids):
            self._read(write, reader, (src_ids, dst_ids), part.crc32)
        else:
            self._writes.finish_if_complete(write)

    def on_withdraw(self, source: WriteSource, write_id: int) -> None:
        """Ends a write whose sender wants its blocks back; if it's unknown, its answer is sent."""
        write = self._writes.find(source, write_id)
        if write is not None:
            self._writes.fail(write, "the sender gave it up")

    def _read(
        self,
        write: IncomingWrite,
        reader: PoolReader,
        pairs: tuple[BlockIds, BlockIds],
        crc32: int | None,
    ) -> None:
        src_ids, dst_ids = pairs
        write.num_missing += 1
        write.num_reading += 1
        self._fences.begin_receive(write.fence)

        def on_done() -> None:
            self._fences.end_receive(write.fence)
            write.num_reading -= 1
            if write.is_failed:
                self._writes.answer_failure(write)
            else:
                num_bytes = len(dst_ids) * self._region.block_bytes
                self._writes.take(write, num_bytes, self._error(dst_ids, crc32))

        reader.read(src_ids, dst_ids, on_done)

    def _error(self, block_ids: BlockIds, crc32: int | None) -> str | None:
        if not self._verify_checksums:
            return None
        return checksum_error(self._region, runs_of(block_ids.tolist()), crc32)


def _pairs(part: ReadPart, reader: PoolReader) -> tuple[BlockIds, BlockIds]:
    """Blocks of the sender and their places here, which the fence has yet to check.

    Raises TransferError if they make no sense.
    """
    src_ids, dst_ids = unpack_block_ids(part.src_blocks), unpack_block_ids(part.dst_blocks)
    if len(src_ids) != len(dst_ids):
        raise TransferError(f"{len(src_ids)} blocks were announced for {len(dst_ids)} places")
    if len(src_ids) and int(src_ids.max()) >= reader.num_blocks:
        raise TransferError("a block is outside the sender's pool")
    return src_ids, dst_ids
