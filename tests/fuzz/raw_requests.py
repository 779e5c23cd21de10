"""What goes over one connection, byte by byte, made from a seed: mostly wrong, some of it right."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum, auto

from hostile_bodies import CHAT, COMPLETIONS, good_body, hostile_body, json_text
from hostile_heads import METHODS, Headers, strange_headers, strange_target


class Ending(StrEnum):
    """What the client does when it has sent everything."""

    READ = auto()
    HALF_CLOSE = auto()
    HANG_UP = auto()
    READ_SOME = auto()


@dataclass(slots=True)
class RawRequest:
    """`parts` are sent with a pause between any two. `num_requests` is how many they hold."""

    parts: list[bytes]
    ending: Ending = Ending.READ
    num_requests: int = 1

    @property
    def data(self) -> bytes:
        return b"".join(self.parts)


@dataclass(slots=True)
class _Draft:
    method: bytes
    target: bytes
    headers: Headers = field(default_factory=list)
    body: bytes = b""
    version: bytes = b"HTTP/1.1"
    frames_body: bool = True
    newline: bytes = b"\r\n"

    def bytes(self) -> bytes:
        headers = list(self.headers)
        if self.frames_body and (self.body or self.method == b"POST"):
            headers.append((b"Content-Length", str(len(self.body)).encode()))
        lines = [b" ".join([self.method, self.target, self.version])]
        lines += [name + b": " + value for name, value in headers]
        return self.newline.join(lines) + self.newline * 2 + self.body


_GETS = [
    *(b"/v1/models", b"/v1/models/toy", b"/health", b"/ping", b"/version", b"/load"),
    *(b"/load_config", b"/metrics", b"/openapi.json"),
]
_HOST = (b"Host", b"localhost")
_JSON = (b"Content-Type", b"application/json")


def make_request(seed: int) -> RawRequest:
    """The same for the same seed."""
    rng = random.Random(seed)
    kind = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
    request = kind(rng)
    if len(request.parts) == 1 and rng.random() < 0.2:
        request.parts = _cut(request.parts[0], rng)
    if request.ending is Ending.READ and rng.random() < 0.12:
        request.ending = rng.choice([Ending.HALF_CLOSE, Ending.HANG_UP, Ending.READ_SOME])
    return request


def _good(rng: random.Random) -> _Draft:
    if rng.random() < 0.15:
        return _Draft(b"GET", rng.choice(_GETS), [_HOST])
    path, body = good_body(rng)
    return _Draft(b"POST", path.encode(), [_HOST, _JSON], json_text(body))


def _valid(rng: random.Random) -> RawRequest:
    return RawRequest([_good(rng).bytes()])


def _bad_body(rng: random.Random) -> RawRequest:
    path, body = hostile_body(rng)
    return RawRequest([_Draft(b"POST", path.encode(), [_HOST, _JSON], body).bytes()])


def _mutated_body(rng: random.Random) -> RawRequest:
    """Framed rightly, so that the router has to read what became of it."""
    path, body = hostile_body(rng) if rng.random() < 0.3 else good_body(rng)
    text = body if isinstance(body, bytes) else json_text(body)
    return RawRequest([_Draft(b"POST", path.encode(), [_HOST, _JSON], _mutated(text, rng)).bytes()])


def _mutated_bytes(rng: random.Random) -> RawRequest:
    return RawRequest([_mutated(_good(rng).bytes(), rng)])


def _mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(8):
            case 0 | 1 if changed:
                changed[min(at, len(changed) - 1)] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + rng.randrange(1, 9)]
            case 4:
                changed[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 5:
                changed[at:at] = rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8", b"\0"])
            case 6:
                start = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + rng.randrange(1, 40)]
            case _:
                changed[at:at] = rng.choice([b"{", b"}", b"[", b'"', b"\\u", b"\r\n", b":", b","])
    return bytes(changed)


def _strange_path(rng: random.Random) -> RawRequest:
    draft = _good(rng)
    draft.target = strange_target(rng)
    return RawRequest([draft.bytes()])


def _strange_method(rng: random.Random) -> RawRequest:
    draft = _good(rng)
    draft.method = rng.choice(METHODS)
    if rng.random() < 0.5:
        draft.body = b""
    return RawRequest([draft.bytes()])


def _strange_headers(rng: random.Random) -> RawRequest:
    draft = _good(rng)
    chosen = strange_headers(rng)
    if chosen[0][0] == b"Host" and rng.random() < 0.8:
        draft.headers.remove(_HOST)
    if chosen[0][0] == b"Origin" and rng.random() < 0.6:
        draft.method, draft.body = b"OPTIONS", b""
    draft.headers[rng.randrange(len(draft.headers) + 1) :] = chosen
    if chosen[0][0] in (b"Transfer-Encoding", b"Content-Length"):
        draft.frames_body = rng.random() < 0.5
    return RawRequest([draft.bytes()])


def _chunked(rng: random.Random) -> RawRequest:
    path, body = good_body(rng) if rng.random() < 0.7 else hostile_body(rng)
    text = body if isinstance(body, bytes) else json_text(body)
    headers = [_HOST, _JSON, (b"Transfer-Encoding", b"chunked")]
    pieces = _cut(text, rng) if text else []
    extension = rng.choice([b"", b"", b"", b";a=b", b';a="' + b"x" * 3000 + b'"'])
    chunks = [b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces]
    end = rng.choice(
        [b"0\r\n\r\n"] * 6 + [b"", b"0\r\n", b"0\r\nTrailer: x\r\n\r\n", b"00\r\n\r\n"]
    )
    if rng.random() < 0.15 and chunks:
        bad = rng.choice(
            [b"g\r\n", b"-1\r\n", b"f" * 20 + b"\r\n", b"5\r\nabc", b"\r\n", b"5 5\r\n"]
        )
        chunks.insert(rng.randrange(len(chunks) + 1), bad)
    head = _Draft(b"POST", path.encode(), headers, frames_body=False).bytes()
    return RawRequest(
        [head, *chunks, end] if rng.random() < 0.5 else [b"".join([head, *chunks, end])]
    )


def _wrong_length(rng: random.Random) -> RawRequest:
    draft = _good(rng)
    length = max(0, len(draft.body) + rng.choice([-50, -1, 1, 3, 1000, 10**6, 10**9]))
    draft.headers.append((b"Content-Length", b"%d" % length))
    draft.frames_body = False
    return RawRequest([draft.bytes()])


def _long_body(rng: random.Random) -> RawRequest:
    size = rng.choice([100_000, 140_000, 400_000])
    text = b'{"prompt":"' + b"a" * size + b'"}'
    draft = _Draft(b"POST", COMPLETIONS.encode(), [_HOST, _JSON], text)
    if rng.random() < 0.5:
        head = _Draft(
            *(b"POST", CHAT.encode(), [_HOST, _JSON, (b"Transfer-Encoding", b"chunked")]),
            frames_body=False,
        ).bytes()
        return RawRequest([head, b"%x\r\n" % len(text) + text + b"\r\n0\r\n\r\n"])
    return RawRequest([draft.bytes()])


def _pipelined(rng: random.Random) -> RawRequest:
    drafts = [_good(rng) for _ in range(rng.randrange(2, 5))]
    parts = [draft.bytes() for draft in drafts]
    ending = rng.choice([Ending.READ, Ending.READ, Ending.HANG_UP, Ending.READ_SOME])
    return RawRequest([b"".join(parts)], ending, num_requests=len(parts))


def _other_versions(rng: random.Random) -> RawRequest:
    draft = _good(rng)
    draft.version = rng.choice(
        [b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"", b"ICE/1.0"]
    )
    draft.newline = rng.choice([b"\r\n", b"\n", b"\r"])
    return RawRequest([rng.choice([b"", b"\r\n", b"\n\n"]) + draft.bytes()])


def _no_http(rng: random.Random) -> RawRequest:
    return RawRequest(
        [
            rng.choice(
                [
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(30),
                    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(60),
                    rng.randbytes(rng.choice([1, 10, 1000, 100_000])),
                    b"\r\n" * rng.choice([1, 2000]),
                    b"GET ",
                    b"",
                    b"POST /v1/completions HTTP/1.1\r\n",
                    b"POST /v1/completions HTTP/1.1\r\nX: " + b"a" * 100_000,
                    b"*1\r\n$4\r\nPING\r\n",
                    b"\0" * 500,
                ]
            )
        ]
    )


def _truncated(rng: random.Random) -> RawRequest:
    data = _good(rng).bytes()
    return RawRequest([data[: rng.randrange(len(data))]])


def _cut(data: bytes, rng: random.Random) -> list[bytes]:
    ends = sorted(rng.sample(range(len(data) + 1), min(len(data) + 1, rng.randrange(1, 6))))
    starts = [0, *ends]
    return [
        part
        for start, end in zip(starts, [*ends, len(data)], strict=True)
        if (part := data[start:end])
    ]


_KINDS: dict[Callable[[random.Random], RawRequest], int] = {
    _valid: 6,
    _bad_body: 40,
    _mutated_body: 14,
    _mutated_bytes: 10,
    _strange_path: 6,
    _strange_method: 4,
    _strange_headers: 10,
    _chunked: 5,
    _wrong_length: 3,
    _long_body: 1,
    _pipelined: 4,
    _other_versions: 3,
    _no_http: 2,
    _truncated: 3,
}


def seeds(first: int, count: int) -> Iterable[int]:
    return range(first, first + count)
