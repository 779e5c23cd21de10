"""The two files of `tandem run-batch`: requests to read, results to add to."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec

from protocol.decoding import decode
from protocol.errors import InvalidRequestError, StartupError, UnreadableError
from services.router.batch.lines import (
    BATCH_ENDPOINTS,
    LineValidator,
    RequestLine,
    ResultLine,
    parse_line,
)


class RequestFile:
    """Validated as a whole before anything runs; StartupError names the first bad line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        validator = LineValidator(BATCH_ENDPOINTS, None)
        self.custom_ids: set[str] = set()
        for number, line in self._lines():
            try:
                self.custom_ids.add(validator.check(line).custom_id)
            except InvalidRequestError as error:
                raise StartupError(f"{path}, line {number}: {error.message}") from error
        if not self.custom_ids:
            raise StartupError(f"{path} holds no request.")

    def requests(self) -> Iterator[RequestLine]:
        for _, line in self._lines():
            yield parse_line(line)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if stripped := line.strip():
                        yield number, stripped
        except OSError as error:
            raise StartupError(f"Can't read {self._path}: {error.strerror}.") from error


class _Id(msgspec.Struct):
    custom_id: str


_ids = msgspec.json.Decoder(_Id)


class ResultFile:
    """Opened with what an earlier run left in it: `done` are the requests that have results."""

    def __init__(self, path: Path, requests: RequestFile) -> None:
        """StartupError if it can't be written, or holds something else."""
        self.done: set[str] = set()
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise StartupError(f"Can't write {path}: {error.strerror}.") from error
        self._file.seek(0)
        num_kept = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break  # an earlier run was killed as it wrote this
            try:
                custom_id = decode(_ids, line).custom_id
            except UnreadableError:
                custom_id = None
            if custom_id not in requests.custom_ids:
                self._file.close()
                raise StartupError(
                    f"{path}, line {number} is no result of these requests; choose another file."
                )
            self.done.add(custom_id)
            num_kept += len(line)
        self._file.truncate(num_kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, result: ResultLine) -> None:
        """On disk when this returns, as far as a kill of this process goes."""
        self._file.write(result.encode())
        self._file.flush()


def is_same_file(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and first.samefile(second)
