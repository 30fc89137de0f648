"""Protobuf's fields by their lengths, as protobuf itself writes and reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlops.wire_format import fields

struct_pb2 = pytest.importorskip("google.protobuf.struct_pb2", reason="protobuf is in the triton extra")
message_module = pytest.importorskip("google.protobuf.message", reason="likewise")

MESSAGE = b"\x0a\x03abc" + b"\x10\x96\x01" + b"\x19" + bytes(8) + b"\x25" + bytes(4) + b"\x32\x00"


def test_each_field_has_its_number_and_place() -> None:
    assert list(fields(MESSAGE)) == [(1, 2, 5), (2, 6, 8), (3, 9, 17), (4, 18, 22), (6, 24, 24)]
    assert next(fields(b"ab" + MESSAGE + b"cd", 2, 2 + len(MESSAGE))) == (1, 4, 7)
    assert list(fields(b"")) == []


@pytest.mark.parametrize("length", [one for one in range(1, len(MESSAGE)) if one not in (5, 8, 17, 22)])
def test_a_message_that_is_cut_off_is_none(length: int) -> None:
    with pytest.raises(ValueError, match="end"):
        list(fields(MESSAGE[:length]))


@pytest.mark.parametrize("damaged", [b"\x0b", b"\x0e", b"\x10" + b"\xff" * 20, b"\x0a\xff\xff\xff\xff\xff\x01"])
def test_what_no_message_has_is_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError, match=r"of kind|end"):
        list(fields(damaged))


@given(st.dictionaries(st.text(max_size=5), st.none() | st.floats() | st.text(max_size=20), max_size=8))
def test_what_protobuf_writes_is_read(values: dict[str, object]) -> None:
    struct = struct_pb2.Struct()
    struct.update(values)
    message = struct.SerializeToString()
    found = list(fields(message))
    assert [number for number, _, _ in found] == [1] * len(values)
    for _, begin, end in found:
        entry = struct_pb2.Struct.FieldsEntry.FromString(message[begin:end])
        assert entry.key in values
        assert [number for number, _, _ in fields(message, begin, end)] == [1, 2]


@given(st.binary(max_size=40))
def test_what_protobuf_takes_is_taken_but_for_groups(data: bytes) -> None:
    try:
        struct_pb2.Struct.FromString(data)
    except message_module.DecodeError:
        return
    refused = ""
    try:
        assert all(begin <= end <= len(data) for _, begin, end in fields(data))
    except ValueError as error:
        refused = str(error)
    assert not refused or "is of kind" in refused
