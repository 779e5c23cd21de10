"""A batch's lines and its statuses, without a server."""

import json

import pytest

from protocol.errors import InvalidRequestError
from services.router.batch.answer import Answer
from services.router.batch.lines import (
    LineValidator,
    answered,
    parse_line,
    tokens_used,
    unanswered,
    with_priority,
)
from services.router.batch.records import BatchRecord, BatchStatus


@pytest.mark.parametrize(
    ("body", "priority"),
    [
        (b"{}", 7),
        (b" { } ", 7),
        (b'{"a": 1}', 7),
        (b'{"priority": null}', 7),
        (b'{"priority": -3, "a": "}"}', 7),
        (b'{"priority": 7}', 7),
        (b'{"priority": 8}', 8),
        (b'{"priority": "x"}', "x"),
        (b'{"priority": true}', True),
    ],
)
def test_the_priority_is_raised_to_the_least(body: bytes, priority: object) -> None:
    changed = json.loads(with_priority(body, 7))
    assert changed == json.loads(body) | {"priority": priority}


def test_a_body_stays_as_it_was_written() -> None:
    body = b'{"x":  1.10, "big": 123456789012345678901234567890}'
    line = parse_line(b'{"custom_id": "a", "url": "/v1/x", "body": ' + body + b"}")
    assert bytes(line.body) == body


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "\xff"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    ],
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        parse_line(b'{"custom_id": "a", "url": "/v1/x", "body": ' + body + b"}")
    assert refused.value.code == "invalid_json_line"


@pytest.mark.parametrize("number", [b"1e999", b"9" * 5000])
def test_a_number_that_is_none_is_refused(number: bytes) -> None:
    line = b'{"custom_id": "a", "url": "/v1/x", "body": {"priority": ' + number + b"}}"
    with pytest.raises(InvalidRequestError, match="out of range") as refused:
        LineValidator(["/v1/x"], None).check(line)
    assert (refused.value.field, refused.value.code) == ("body", "invalid_json_line")


def test_results_have_openais_form() -> None:
    line = json.loads(answered("a", Answer(200, b'{"id":"x"}')).encode())
    assert line["response"] == {"status_code": 200, "request_id": "x", "body": {"id": "x"}}
    assert (line["custom_id"], line["error"]) == ("a", None)
    line = json.loads(answered("a", Answer(400, b'{"error":{}}')).encode())
    assert line["response"]["request_id"] == line["id"]
    for strange in (b"[]", b'{"id":1}', b'{"usage":{"prompt_tokens":"many"}}'):
        line = json.loads(answered("a", Answer(200, strange)).encode())
        assert line["response"]["request_id"] == line["id"]
        assert line["response"]["body"] == json.loads(strange)
    line = json.loads(answered("a", Answer(499, b"")).encode())
    assert (line["response"], line["error"]["code"]) == (None, "request_aborted")
    line = json.loads(unanswered("b", "batch_expired", "late").encode())
    assert line["error"] == {"code": "batch_expired", "message": "late"}
    assert line["response"] is None


def test_usage_is_read_in_both_forms() -> None:
    chat = {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": None}
    responses = {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 2},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 1},
    }
    used = tokens_used(json.dumps({"usage": chat}).encode())
    assert (used["input_tokens"], used["output_tokens"], used["cached_tokens"]) == (3, 4, 0)
    assert list(tokens_used(json.dumps({"usage": responses}).encode()).values()) == [3, 2, 4, 1]
    assert set(tokens_used(b'{"usage": null}').values()) == {0}


def test_a_status_is_not_left_for_an_earlier_one() -> None:
    record = BatchRecord(
        id="batch_1",
        endpoint="/v1/completions",
        input_file_id="file-1",
        completion_window="24h",
        created_at=0,
        expires_at=1,
        output_ttl_s=1,
    )
    failed = record.advanced(BatchStatus.FAILED, now=5.5)
    assert (failed.failed_at, failed.is_over) == (5, True)
    with pytest.raises(ValueError, match="failed can't be completed"):
        failed.advanced(BatchStatus.COMPLETED, now=6)
