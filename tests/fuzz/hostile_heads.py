"""Methods, targets and headers that few clients send."""

import random

Headers = list[tuple[bytes, bytes]]

METHODS = [
    *(b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE"),
    *(b"CONNECT", b"PROPFIND", b"PURGE", b"PRI", b"M-SEARCH", b"FOO", b"get", b"", b"\0"),
]


def strange_target(rng: random.Random) -> bytes:
    return rng.choice(
        [
            *(b"/", b"/v1", b"/v1/", b"/v2/models", b"//v1/models", b"/v1/models/", b"/v1//models"),
            *(
                b"/v1/models/%00",
                b"/v1/models/%ff%fe",
                b"/v1/models/%ed%a0%80",
                b"/v1/models/a%2Fb",
            ),
            *(b"/v1/chat/completions/", b"/v1/chat", b"/%76%31/models", b"/v1/models?x=[&%zz"),
            *(b"/health/", b"/health?", b"/health#x", b"/../etc/passwd", b"/v1/../health", b"/%"),
            *(
                b"*",
                b"",
                b"http://localhost/v1/models",
                b"http://[/x",
                b"localhost:80",
                b"\xff\xfe",
            ),
            *(b"/" + b"a" * rng.choice([300, 9000, 70000]), b"/v1/models/" + b"%41" * 3000),
            *(b"/v1/models/\xc3\xa9", b"/\x7f", b"/a b", b"/?" + b"q" * 20000, b"/docs", b"/redoc"),
        ]
    )


def strange_headers(rng: random.Random) -> Headers:
    """One or several that belong together; some have no place in HTTP."""
    size = rng.choice([100, 3000, 20_000, 70_000, 300_000])
    extra: list[Headers] = [
        [
            (
                b"Content-Type",
                rng.choice([b"text/plain", b"", b"multipart/form-data", b"\xff", b";"]),
            )
        ],
        [(b"Content-Encoding", rng.choice([b"gzip", b"br", b"identity"]))],
        [(b"X-Long", b"a" * size)],
        [(b"X-%d" % i, b"b" * 20) for i in range(size // 30)],
        [(b"a" * size, b"c")],
        [(b"Host", rng.choice([b"[", b"[::1", b"", b"a b", b"\xff", b"x" * 5000, b"a:b:c", b"%"]))],
        [(b"Origin", b"http://page.example"), (b"Cookie", b"a=b")],
        [(b"Origin", b"null"), (b"Access-Control-Request-Method", rng.choice([b"POST", b"FOO"]))],
        [(b"Authorization", rng.choice([b"", b"Bearer", b"Bearer \xff", b"Basic x", b"B " * 999]))],
        [(b"Connection", rng.choice([b"close", b"keep-alive", b"upgrade", b"x, close", b""]))],
        [(b"Connection", b"Upgrade"), (b"Upgrade", rng.choice([b"h2c", b"websocket", b"x"]))],
        [(b"Expect", rng.choice([b"100-continue", b"200-ok", b""]))],
        [(b"Transfer-Encoding", rng.choice([b"chunked", b"gzip", b"identity", b"x, chunked"]))],
        [(b"Content-Length", rng.choice([b"5", b"-1", b"+5", b"0x5", b"", b"9" * 30, b"1, 1"]))],
        [(b"X-Bad\x00", b"a")],
        [(b"X Space", b"a")],
        [(b"X-Nul", b"a\x00b")],
        [(b"X-Fold", b"a\r\n b")],
        [(b"Accept", b"text/event-stream"), (b"Range", b"bytes=0-1"), (b"TE", b"trailers")],
        [(b"X-Request-Id", b"a\tb"), (b"Forwarded", b"for=[::1]"), (b"Accept-Encoding", b"gzip")],
    ]
    return rng.choice(extra)
