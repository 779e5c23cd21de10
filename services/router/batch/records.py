"""A batch: what is known of it, and which status may follow which."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec


class BatchStatus(StrEnum):
    """`cancelling` isn't here: it's any of the first three, of a batch that is to be cancelled."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


_NEXT: Mapping[BatchStatus, frozenset[BatchStatus]] = {
    BatchStatus.VALIDATING: frozenset(
        {
            BatchStatus.IN_PROGRESS,
            BatchStatus.FAILED,
            BatchStatus.EXPIRED,
            BatchStatus.CANCELLED,
        }
    ),
    BatchStatus.IN_PROGRESS: frozenset(
        {
            BatchStatus.FINALIZING,
            BatchStatus.FAILED,
            BatchStatus.EXPIRED,
            BatchStatus.CANCELLED,
        }
    ),
    BatchStatus.FINALIZING: frozenset({BatchStatus.COMPLETED, BatchStatus.FAILED}),
}


class BatchError(msgspec.Struct, frozen=True):
    """Why a batch failed; `line` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Redis `batch:{id}`. Whoever holds the batch's lease writes it, nobody else.

    Times are Unix seconds. `num_lines` counts blank lines too; both numbers are known once the
    input is validated.
    """

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    output_ttl_s: int
    metadata: dict[str, str] | None = None
    status: BatchStatus = BatchStatus.VALIDATING
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelled_at: int | None = None
    model: str | None = None
    num_requests: int = 0
    num_lines: int = 0
    errors: list[BatchError] = []
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def is_over(self) -> bool:
        return self.status not in _NEXT

    def advanced(self, status: BatchStatus, *, now: float, **changes: object) -> "BatchRecord":
        """The record in a later status; raises ValueError for one that can't follow."""
        if status not in _NEXT.get(self.status, frozenset()):
            raise ValueError(f"a batch that is {self.status} can't be {status}")
        return msgspec.structs.replace(self, status=status, **{f"{status}_at": int(now)}, **changes)


class BatchProgress(msgspec.Struct, frozen=True, kw_only=True):
    """What changes while a batch runs. `cancelling_at` is when somebody asked for it."""

    cancelling_at: int | None = None
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


def batch_view(record: BatchRecord, progress: BatchProgress) -> dict[str, Any]:
    """What the API says about a batch."""
    fields = msgspec.to_builtins(record)
    for name in ("output_ttl_s", "num_requests", "num_lines", "errors"):
        del fields[name]
    if progress.cancelling_at is not None and not record.is_over:
        fields["status"] = "cancelling"
    errors = [msgspec.to_builtins(error) for error in record.errors]
    return fields | {
        "object": "batch",
        "errors": {"object": "list", "data": errors} if errors else None,
        "cancelling_at": progress.cancelling_at,
        "request_counts": {
            "total": record.num_requests,
            "completed": progress.completed,
            "failed": progress.failed,
        },
        "usage": {
            "input_tokens": progress.input_tokens,
            "input_tokens_details": {"cached_tokens": progress.cached_tokens},
            "output_tokens": progress.output_tokens,
            "output_tokens_details": {"reasoning_tokens": progress.reasoning_tokens},
            "total_tokens": progress.input_tokens + progress.output_tokens,
        },
    }
