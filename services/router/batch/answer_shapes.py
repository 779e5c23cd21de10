"""The shapes of answers about files and batches, for the API's description."""

from typing import Literal

import msgspec


class FileAnswer(msgspec.Struct):
    """With further fields."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]


class DeletedFile(msgspec.Struct):
    id: str
    object: Literal["file"]
    deleted: bool


class BatchCounts(msgspec.Struct):
    total: int
    completed: int
    failed: int


class BatchAnswer(msgspec.Struct):
    """With further fields."""

    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    status: str
    request_counts: BatchCounts


class FileList(msgspec.Struct):
    object: Literal["list"]
    data: list[FileAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchList(msgspec.Struct):
    object: Literal["list"]
    data: list[BatchAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool
