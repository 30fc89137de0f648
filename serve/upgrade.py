"""A client's wish for another protocol, which HTTP/1.1 lets a server pass over."""

from __future__ import annotations


def without_upgrade(data: bytes) -> bytes:
    """A request whose head is whole, without the wish for another protocol, HTTP/2 or websockets: whoever does not have
    it passes that over (RFC 9110, 7.8)."""
    # As clients write it; looking costs next to nothing where there is none.
    if b"\r\nUpgrade:" not in data and b"\r\nupgrade:" not in data:
        return data
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        return data
    kept = []
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        match name.strip().lower():
            case b"upgrade" | b"http2-settings":
                continue
            case b"connection":
                wishes = [one.strip() for one in value.split(b",")]
                wishes = [one for one in wishes if one.lower() not in (b"upgrade", b"http2-settings")]
                if not wishes:
                    continue
                line = b"Connection: " + b", ".join(wishes)
        kept.append(line)
    return b"\r\n".join(kept) + end + rest
