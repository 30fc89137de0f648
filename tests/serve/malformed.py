"""Requests that no client should send, for the suite and, by the ten thousand, for the experiments."""

from __future__ import annotations

import gzip
import io
import json
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st
from PIL import Image

Draw = random.Random
INFER = "/v2/models/digits/infer"
PIXELS = 64
# Everything that the routes' table allows for a request that is wrong.
ALLOWED = frozenset((400, 404, 405, 408, 411, 413, 415, 429, 431, 501, 503))


def whole(path: str, body: bytes, *headers: str, method: str = "POST", length: int | None = None) -> bytes:
    """A request as it is sent; length: what it says of its body, where that is not true."""
    lines = [f"{method} {path} HTTP/1.1", "Host: h", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1", "replace") + body


def good_head() -> dict[str, Any]:
    tensor = {
        "name": "image",
        "datatype": "FP32",
        "shape": [1, 1, 8, 8],
        "parameters": {"binary_data_size": 4 * PIXELS},
    }
    return {"inputs": [tensor], "outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}


def binary(head: Any, data: bytes, *headers: str, said: int | None = None) -> bytes:
    """In the binary protocol. said: the length of the JSON, where that is not true."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    length = f"Inference-Header-Content-Length: {len(text) if said is None else said}"
    return whole(INFER, text + data, length, *headers)


def good(*headers: str) -> bytes:
    return binary(good_head(), struct.pack("<64f", *[0.5] * PIXELS), *headers)


# What JSON can hold where a number, a name or a list should be.
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.sampled_from(["FP32", "FP16", "INT64", "BYTES", "BOOL", "image", "logits", "binary_data_size"]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=12), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@st.composite
def binary_requests(draw: Callable[[Any], Any]) -> bytes:
    """Near enough to a right one to get past the first check, and wrong somewhere."""
    head = good_head()
    tensor, output = head["inputs"][0], head["outputs"][0]
    data = draw(st.binary(max_size=4 * PIXELS + 8) | st.just(struct.pack("<64f", *[0.5] * PIXELS)))
    target, keys = draw(
        st.sampled_from(
            [
                (tensor, ("name", "datatype", "shape", "parameters", "data")),
                (tensor["parameters"], ("binary_data_size", "shared_memory_region")),
                (output, ("name", "parameters")),
                (output["parameters"], ("binary_data", "classification")),
                (head, ("inputs", "outputs", "id", "parameters")),
            ]
        )
    )
    target[draw(st.sampled_from(keys))] = draw(values)
    said = draw(st.none() | st.integers(-10, 5000))
    text = json.dumps(head).encode()
    if draw(st.integers(0, 9)) == 0:
        text = draw(st.binary(max_size=300))
    return binary(text, data, said=said)


def truncated(draw: Draw) -> bytes:
    """The beginning of a right one, and then the end of the connection."""
    request = good()
    return request[: draw.randrange(1, len(request))]


def garbage(draw: Draw) -> bytes:
    return draw.randbytes(draw.randrange(1, 400)) + b"\r\n\r\n"


def flipped(draw: Draw) -> bytes:
    """A right one with a few bytes changed."""
    request = bytearray(good())
    for _ in range(draw.randrange(1, 6)):
        request[draw.randrange(len(request))] = draw.randrange(256)
    return bytes(request)


def oversized(draw: Draw) -> bytes:
    choice = draw.randrange(4)
    if choice == 0:
        return whole(INFER, b"", length=10 ** draw.randrange(9, 30))
    if choice == 1:
        return whole("/predict", b"x" * 300_000, "Content-Type: image/png")
    if choice == 2:
        return whole(INFER, b"{}", "X: " + "a" * 100_000)
    return whole("/" + "a" * 70_000, b"", method="GET")


def bombs(draw: Draw) -> bytes:
    """Small where it is sent, and large where it is unpacked."""
    choice = draw.randrange(4)
    if choice == 0:
        return whole(INFER, _GZIP_BOMB, "Content-Encoding: gzip", "Inference-Header-Content-Length: 10")
    if choice == 1:
        return whole("/predict", _DEFLATE_BOMB, "Content-Encoding: deflate", "Content-Type: application/json")
    if choice == 2:
        return whole(
            "/predict", _png_of(draw.randrange(10_000, 2**31), draw.randrange(10_000, 2**31)), "Content-Type: image/png"
        )
    return whole("/predict", b'{"inputs": ' + b"[" * draw.randrange(1000, 90_000), "Content-Type: application/json")


def pictures(draw: Draw) -> bytes:
    """Damaged in the middle, cut off, or nothing of the kind."""
    buffer = io.BytesIO()
    kind = draw.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
    Image.frombytes("L", (24, 24), draw.randbytes(24 * 24)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(draw.randrange(1, 20)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    del content[draw.randrange(len(content) // 2, len(content)) :]
    return whole("/predict", bytes(content), f"Content-Type: image/{kind.lower()}")


def forms(draw: Draw) -> bytes:
    body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + draw.randbytes(50)
    body += draw.choice([b"", b"\r\n--x--", b"\r\n--x\r\n", b"\r\n--y--\r\n", b"\r\n--x--\r\n"])
    boundary = draw.choice(["x", "", "y" * 200, "\x7f"])
    return whole("/predict", body, f"Content-Type: multipart/form-data; boundary={boundary}")


def heads(draw: Draw) -> bytes:
    """Headers that contradict one another or mean nothing."""
    odd = draw.choice(
        [
            "Content-Length: -1", "Content-Length: 5", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip",
            "Inference-Header-Content-Length: -5", "Inference-Header-Content-Length: 1e3", "X-Request-Timeout-Ms: -1",
            "X-Request-Timeout-Ms: soon", "Content-Encoding: br", "Content-Encoding: gzip", "Expect: the unexpected",
            "Authorization: \xff", "Host: \xff", "Upgrade: websocket", "Connection: upgrade", "X-Request-Id: \x7f",
        ]
    )  # fmt: skip
    return whole(draw.choice([INFER, "/predict", "/v2/repository/index"]), b"{}", odd)


def targets(draw: Draw) -> bytes:
    """Addresses that are none."""
    nowhere = "/" + chr(draw.randrange(128, 256))
    target = draw.choice(["http://", "http://[::1", "x:1", "*", "/%zz", "?", "#", "a", nowhere])
    return whole(target, b"", method=draw.choice(["GET", "POST", "CONNECT", "OPTIONS"]))


KINDS: tuple[Callable[[Draw], bytes], ...] = (
    truncated, garbage, flipped, oversized, bombs, pictures, forms, heads, targets,
)  # fmt: skip


# Of which the server may wait for more: what is not whole must be ended by who sends it.
UNENDED = frozenset(("truncated", "garbage", "flipped", "heads"))


def requests(seed: int) -> Iterator[tuple[str, bytes]]:
    """One of each kind after the other, without end; each with its kind's name."""
    draw = Draw(seed)
    while True:
        for kind in KINDS:
            yield kind.__name__, kind(draw)


def status_of(port: int, request: bytes, *, ends: bool = False, within_s: float = 20.0) -> int | None:
    """Send it on a connection of its own; the answer's status, None where the connection just ends.

    ends: tell the server that no more comes, as it may wait for it. Who says so in the middle of a request has left.
    Raises TimeoutError where neither happens.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=within_s) as client:
        # Gone at once and not kept by the kernel for a minute: there are not ports enough for a hundred thousand.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        answer = b""
        try:
            client.sendall(request)
            if ends:
                client.shutdown(socket.SHUT_WR)
            while b"\r\n" not in answer and (more := client.recv(65536)):
                answer += more
        except ConnectionError:  # it was refused before it had been sent whole
            while b"\r\n" not in answer and (more := _rest(client)):
                answer += more
    return int(answer.split(b" ", 2)[1]) if answer else None


def _rest(client: socket.socket) -> bytes:
    try:
        return client.recv(65536)
    except ConnectionError:
        return b""


def _png_of(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


_GZIP_BOMB = gzip.compress(bytes(20_000_000))
_DEFLATE_BOMB = zlib.compress(bytes(20_000_000))
