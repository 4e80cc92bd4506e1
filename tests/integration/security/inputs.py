"""What a hostile peer may send, made from seeds: the same seed gives the same bytes.

Plain functions and no sockets, so that a failure can be looked at with `garbage(seed)` in a shell.
"""

from __future__ import annotations

import random
import ssl
import struct
from collections.abc import Callable, Iterator

H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# HTTP/2 frame types (RFC 9113, section 6).
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 6, 7, 8, 9
END_STREAM, END_HEADERS = 1, 4


# ---------------------------------------------------------------- bytes before anything is agreed


def client_hello(rng: random.Random) -> bytes:
    """What a TLS client says first."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=f"h{rng.randrange(1000)}.example")
    try:
        client.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake with nobody was done")


def _cut_hello(rng: random.Random) -> bytes:
    hello = client_hello(rng)
    return hello[: rng.randrange(1, len(hello))]


def _torn_hello(rng: random.Random) -> bytes:
    hello = bytearray(client_hello(rng))
    for _ in range(rng.randrange(1, 20)):
        hello[rng.randrange(len(hello))] = rng.randrange(256)
    return bytes(hello)


def _hello_and_noise(rng: random.Random) -> bytes:
    return client_hello(rng) + rng.randbytes(rng.randrange(1, 5000))


def _records(rng: random.Random) -> bytes:
    """TLS records whose lengths say more than there is, or than there may be."""
    out = b""
    for _ in range(rng.randrange(1, 20)):
        kind, size = rng.choice((20, 21, 22, 23, 255)), rng.choice((0, 1, 16384, 65535))
        out += struct.pack(">BHH", kind, rng.choice((0x0301, 0x0303, 0x0000)), size)
        out += rng.randbytes(rng.randrange(0, 300))
    return out


def _noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 5000))


def _long(rng: random.Random) -> bytes:
    return rng.choice((b"\0", b"\xff", b"A", b"\r\n")) * rng.randrange(60_000, 200_000)


_VERBS = ("GET", "POST", "CONNECT", "OPTIONS", "PRI", "\0GET", "G" * 9000)
_PATHS = ("/swarm.v1.Control/GetInfo", "/../../etc/passwd", "/%00", "/" + "a" * 20_000, "*")


def _http(rng: random.Random) -> bytes:
    head = f"{rng.choice(_VERBS)} {rng.choice(_PATHS)} HTTP/{rng.choice(('1.1', '1.0', '9.9'))}\r\n"
    fields = ["Host: x", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings"]
    fields.append(f"Content-Length: {rng.choice(('-1', '4294967296', '12x', '5'))}")
    fields += ["Transfer-Encoding: chunked"] * rng.randrange(3)
    fields += [f"X-{i}: {'b' * rng.randrange(200)}" for i in range(rng.randrange(300))]
    rng.shuffle(fields)
    return (head + "\r\n".join(fields) + "\r\n\r\nhello").encode()


_OTHERS = (
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"\x05\x01\x00",  # SOCKS
    b"*1\r\n$8\r\nFLUSHALL\r\n",  # Redis
    b"\x00\x00\x00\x2f\xffSMB\x72\x00\x00\x00\x00\x18\x01\x28",
    b"\x03\x00\x00\x13\x0e\xe0\x00\x00\x00\x00\x00\x01\x00\x08\x00\x0b\x00\x00\x00",  # RDP
    b"USER root\r\nPASS toor\r\n",
    b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + b"\x01" * 40,  # SSL 2
    b"GIOP\x01\x02\x00\x00",
    b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n",
    b"\r\n\r\n\0\r\n\0\r\n\0",
)


def _other(rng: random.Random) -> bytes:
    return rng.choice(_OTHERS) + rng.randbytes(rng.randrange(50))


def _h2(rng: random.Random) -> bytes:
    out = H2_PREFACE
    for _ in range(rng.randrange(1, 30)):
        body = rng.randbytes(rng.choice((0, 4, 5, 8, 100, 17_000)))
        out += frame(rng.randrange(12), rng.randrange(256), rng.randrange(1 << 31), body)
    return out


def _relay(rng: random.Random) -> bytes:
    """What another node's relay says, but for the key, and sometimes cut."""
    task = b"t" * rng.choice((0, 25, 255))
    head = struct.pack(
        ">4sBHQ16sB", b"SWR1", 6, rng.randrange(65536), rng.getrandbits(60), rng.randbytes(16),
        len(task),
    )  # fmt: skip
    whole = head + task + rng.randbytes(32)
    return whole[: rng.choice((5, len(head), len(whole), len(whole)))]


SORTS: tuple[Callable[[random.Random], bytes], ...] = (
    _noise, _cut_hello, _torn_hello, _hello_and_noise, _records, _long, _http, _other, _h2, _relay,
)  # fmt: skip


def garbage(seed: int) -> bytes:
    """One input; consecutive seeds give all sorts in turn."""
    return SORTS[seed % len(SORTS)](random.Random(seed))


# ---------------------------------------------------------------- HTTP/2 from a member


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def headers(*fields: tuple[str, str]) -> bytes:
    """A header block of HPACK without its tables (RFC 7541, section 6.2.2)."""

    def text(value: str) -> bytes:
        data, size = value.encode("latin-1"), b""
        left = len(data)
        if left < 127:
            return bytes([left]) + data
        left, size = left - 127, b"\x7f"
        while left >= 128:
            size += bytes([left % 128 + 128])
            left //= 128
        return size + bytes([left]) + data

    return b"".join(b"\0" + text(name) + text(value) for name, value in fields)


CALL = (
    (":method", "POST"),
    (":scheme", "https"),
    (":path", "/swarm.v1.Certificates/IssueNodeCertificate"),
    (":authority", "swarm-manager"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
)
HELLO = H2_PREFACE + frame(SETTINGS, 0, 0, b"")


def _call(stream: int, *more: tuple[str, str]) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, headers(*CALL, *more))


def _message(data: bytes, *, claims: int | None = None, packed: int = 0) -> bytes:
    return struct.pack(">BI", packed, len(data) if claims is None else claims) + data


def _changed(name: str, value: str) -> bytes:
    fields = [(n, value if n == name else v) for n, v in CALL]
    return frame(HEADERS, END_HEADERS, 1, headers(*fields))


def h2_attacks() -> Iterator[tuple[str, bytes]]:
    """What somebody with a node's certificate may send in place of calls: (name, bytes)."""
    yield "a frame of 16 MiB", HELLO + b"\xff\xff\xff" + bytes([DATA, 0]) + b"\0\0\0\1" + bytes(99)
    yield "pings", HELLO + frame(PING, 0, 0, bytes(8)) * 5_000
    yield "settings", HELLO + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 1000)) * 5_000
    yield "settings of nonsense", HELLO + frame(SETTINGS, 0, 0, b"\xff" * 6 * 100)
    yield "settings of 5 bytes", HELLO + frame(SETTINGS, 0, 0, b"12345")
    many = (("x-a", "b" * 4000),) * 4
    yield (
        "headers of 16 MiB",
        HELLO
        + frame(HEADERS, 0, 1, headers(*CALL))
        + (frame(CONTINUATION, 0, 1, headers(*many)) * 1000),
    )
    yield (
        "continuations of nothing",
        HELLO + frame(HEADERS, 0, 1, headers(*CALL)) + (frame(CONTINUATION, 0, 1, b"") * 20_000),
    )
    yield "one header of 1 MiB", HELLO + frame(HEADERS, END_HEADERS, 1, b"\0" + b"\x7f\xff\xff\x3f")
    yield (
        "calls taken back at once",
        HELLO
        + b"".join(
            _call(i) + frame(RST_STREAM, 0, i, struct.pack(">I", 8)) for i in range(1, 8001, 2)
        ),
    )
    yield "3,000 calls without an end", HELLO + b"".join(_call(i) for i in range(1, 6001, 2))
    yield "data for no stream", HELLO + frame(DATA, 0, 0, b"x") + frame(DATA, 0, 7, b"x")
    yield "a stream of the server's", HELLO + _call(2)
    yield "streams backwards", HELLO + _call(9) + _call(3)
    yield "an update of nothing", HELLO + frame(WINDOW_UPDATE, 0, 0, bytes(4))
    yield "updates without end", HELLO + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff") * 3
    yield "priorities", HELLO + frame(PRIORITY, 0, 1, bytes(5)) * 5_000
    yield "goodbye", HELLO + frame(GOAWAY, 0, 0, bytes(8))
    yield "headers that are none", HELLO + frame(HEADERS, END_HEADERS, 1, b"\xff" * 500)
    yield "a table of 4 GiB", HELLO + frame(HEADERS, END_HEADERS, 1, b"\x3f\xff\xff\xff\xff\x0f")
    yield "no preface", frame(SETTINGS, 0, 0, b"") + _call(1)
    yield "another preface", b"PRI * HTTP/3.0\r\n\r\nSM\r\n\r\n" + _call(1)
    yield "HTTP/1 in TLS", b"POST /swarm.v1.Control/GetInfo HTTP/1.1\r\nHost: x\r\n\r\n"
    for size in (2**32 - 1, 2**31, 40 << 20):
        body = _message(b"x" * 100, claims=size)
        yield f"a message of {size} bytes", HELLO + _call(1) + frame(DATA, 0, 1, body)
    yield (
        "a message that is not packed and says so",
        HELLO + _call(1) + frame(DATA, END_STREAM, 1, _message(b"x" * 100, packed=1)),
    )
    yield (
        "a message packed in an unknown way",
        HELLO
        + _call(1, ("grpc-encoding", "rot13"))
        + frame(DATA, END_STREAM, 1, _message(b"x" * 100, packed=1)),
    )
    yield "no message", HELLO + frame(HEADERS, END_HEADERS | END_STREAM, 1, headers(*CALL))
    yield "half a message", HELLO + _call(1) + frame(DATA, END_STREAM, 1, _message(b"x", claims=9))
    for path in ("", "/", "/swarm.v1.Control", "/swarm.v1.Control/No", "/" + "p" * 9000, "*"):
        yield f"path {path[:20]!r}", HELLO + _changed(":path", path)
    for name, value in (
        (":method", "GET"),
        (":scheme", "gopher"),
        ("content-type", "text/html"),
        ("te", "gzip"),
        (":authority", "\0"),
    ):
        yield f"{name} {value!r}", HELLO + _changed(name, value)
    for timeout in ("99999999999H", "-1S", "1", "x"):
        yield f"timeout {timeout!r}", HELLO + _call(1, ("grpc-timeout", timeout))


# ---------------------------------------------------------------- messages of protobuf


def _nested(depth: int) -> bytes:
    """A message within a message, field 1, so many times."""
    out = b""
    for _ in range(depth):
        size, left = b"", len(out)
        while left >= 128:
            size += bytes([left % 128 + 128])
            left //= 128
        out = b"\x0a" + size + bytes([left]) + out
    return out


def broken_messages(seed: int) -> Iterator[tuple[str, bytes]]:
    """Bytes that are no message at all, whatever the method takes: (name, bytes)."""
    rng = random.Random(seed)
    yield "field 0", b"\x00\x01" + rng.randbytes(30)
    yield "a varint without end", b"\xff" * rng.randrange(11, 200)
    yield "cut off", b"\x0a\x7f" + rng.randbytes(20)
    yield "a length of 2 GiB", b"\x0a\xff\xff\xff\xff\x07" + rng.randbytes(20)
    yield "a group without end", b"\x0b" * rng.randrange(1, 50)
    yield "an unknown wire type", b"\x0f" + rng.randbytes(10)


def odd_messages(seed: int) -> Iterator[tuple[str, bytes]]:
    """Bytes that may be a message, and mean nothing good: (name, bytes)."""
    rng = random.Random(seed)
    yield "nested 5,000 deep", _nested(5_000)
    yield "nested 90 deep", _nested(90)
    yield (
        "unknown fields",
        b"".join(
            bytes([(rng.randrange(1, 15) << 3)]) + bytes([rng.randrange(128)]) for _ in range(1000)
        ),
    )
    yield "a string that is no text", b"\x0a\x04\xff\xfe\xfd\xfc"
    yield "a string of 50 KB", b"\x0a\xd0\x86\x03" + b"A" * 50_000
    yield "noise", rng.randbytes(rng.randrange(1, 300))
