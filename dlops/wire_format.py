"""Protobuf messages by the lengths of their fields, without making them.

What is made of a message may be a hundred times as large as it, and takes longer than there is between two calls.
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator


def fields(message: bytes, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, int]]:
    """(number, where its content begins, where it ends) of each field, one after the other.

    start, stop: of a message that is a field of this one. Raises ValueError where the bytes are no message.
    """
    end = len(message) if stop is None else stop
    place = start
    while place < end:
        key, place = _varint(message, place, end)
        begins = place
        match key & 7:
            case 0:  # a number
                _, place = _varint(message, place, end)
            case 1:  # of eight bytes
                place += 8
            case 2:  # a text, bytes or a message, after its length
                length, begins = _varint(message, place, end)
                place = begins + length
            case 5:  # of four bytes
                place += 4
            case kind:
                raise ValueError(f"field {key >> 3} is of kind {kind}, which no message has")
        if place > end:
            raise ValueError(f"field {key >> 3} ends behind its message")
        yield key >> 3, begins, place


def _varint(message: bytes, place: int, end: int) -> tuple[int, int]:
    """(number, where it ends)"""
    number = shift = 0
    while place < end and shift < 70:
        byte = message[place]
        number |= (byte & 0x7F) << shift
        shift, place = shift + 7, place + 1
        if byte < 0x80:
            return number, place
    raise ValueError("a number does not end")
