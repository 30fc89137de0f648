"""Metadata out of a model file without its framework: nothing is imported, run or unpickled, weights stay unread."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, Literal
from xml.parsers import expat

from dlops.errors import CorruptError, from_os_error

# Labels and signatures take kilobytes.
MAX_METADATA_BYTES = 4 * 1024 * 1024
# An ONNX file has some tens of fields at its top and one for each function; a crafted one could have a billion.
_MAX_FIELDS = 100_000
# Field numbers of onnx.ModelProto and onnx.StringStringEntryProto.
_GRAPH, _METADATA_PROPS = 7, 14
_KEY, _VALUE = 1, 2
# Protobuf's wire types.
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}


ModelFormat = Literal["aotinductor", "executorch", "onnx", "openvino", "tensorrt", "torchexport", "torchscript"]
# What TensorRT's serialized engines begin with.
_ENGINE = b"ftrt"


def format_of(path: Path) -> ModelFormat:
    """By the content, whatever the name.

    torch's formats are archives, OpenVINO's graph is XML, TensorRT's engine and ExecuTorch's program say so in bytes 0
    and 4, and anything else is taken for ONNX.
    """
    try:
        with path.open("rb") as file:
            head = file.read(6)
        if head.startswith((b"<?xml", b"<net ")):
            return "openvino"
        if head.startswith(_ENGINE):
            return "tensorrt"
        if not head.startswith(b"PK\x03\x04"):
            return "executorch" if head[4:] == b"ET" else "onnx"
        with zipfile.ZipFile(path) as archive:
            members = [name.partition("/")[2] for name in archive.namelist()]
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise CorruptError(f"{path}: the archive cannot be read: {error}") from None
    if "archive_format" not in members:
        return "torchscript"
    return "aotinductor" if any(name.startswith("data/aotinductor/") for name in members) else "torchexport"


def onnx_metadata(path: Path) -> dict[str, str]:
    """`metadata_props` by key. Raises CorruptError where the file is no ONNX model, or they are over 4 MiB."""
    try:
        with path.open("rb") as file:
            return _walk(file, path)
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error


def archive_extra(path: Path, name: str) -> bytes | None:
    """The extra file of that name in an archive of torch's, None where there is none.

    Raises CorruptError where the archive cannot be read, is none of torch's, or the member is over 4 MiB.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if "archive_format" not in members and ("data.pkl" not in members or "version" not in members):
                raise CorruptError(f"{path}: a zip file, and no TorchScript file: it has no data.pkl and version")
            entry = members.get(f"extra/{name}")
            if entry is None:
                return None
            if entry.file_size > MAX_METADATA_BYTES:
                raise CorruptError(f"{path}: its {name} unpacks to {entry.file_size} bytes: not what dlops writes")
            return archive.read(entry)
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    # What zipfile raises for a damaged, encrypted or unknown kind of member.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise CorruptError(f"{path}: the archive cannot be read: {error}") from None


def openvino_rt_info(path: Path, section: str) -> dict[str, str]:
    """The model's `rt_info` under `section` by key, empty where there is none.

    Raises CorruptError where the file is no OpenVINO graph, or they are over 4 MiB.
    """
    reader = _RtInfo(section, path)
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    # Entities could be made to grow without bound, and OpenVINO writes none.
    parser.StartDoctypeDeclHandler = reader.doctype
    try:
        with path.open("rb") as file:
            parser.ParseFile(file)
    except OSError as error:
        raise from_os_error(error, doing=f"reading {path}") from error
    except expat.ExpatError as error:
        raise CorruptError(f"{path}: not an OpenVINO graph, or cut short: {error}") from None
    return reader.entries


class _RtInfo:
    """Collects `<net><rt_info><section><KEY value="...">`."""

    def __init__(self, section: str, path: Path) -> None:
        self._within, self._path = ["net", "rt_info", section], path
        self._open: list[str] = []
        self._taken = 0
        self.entries: dict[str, str] = {}

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._open and name != "net":
            raise CorruptError(f"{self._path}: XML, and no OpenVINO graph: it begins with <{name[:50]}>")
        if self._open == self._within:
            self.entries[name] = attributes.get("value", "")
            self._taken += len(name) + len(self.entries[name])
            if self._taken > MAX_METADATA_BYTES:
                raise CorruptError(f"{self._path}: over {MAX_METADATA_BYTES} bytes of metadata: not what dlops writes")
        self._open.append(name)

    def end(self, name: str) -> None:
        self._open.pop()

    def doctype(self, *_: object) -> None:
        raise CorruptError(f"{self._path}: it declares a document type, which no OpenVINO graph does")


class _NotProtobufError(Exception):
    pass


def _walk(file: BinaryIO, path: Path) -> dict[str, str]:
    size = os.fstat(file.fileno()).st_size
    entries: dict[str, str] = {}
    has_graph, taken = False, 0
    try:
        for _ in range(_MAX_FIELDS):
            if file.tell() == size:
                break
            number, wire = divmod(_varint(file), 8)
            length = _varint(file) if wire in (_VARINT, _LENGTH) else _FIXED_BYTES.get(wire)
            if wire == _VARINT:
                continue
            if length is None or number == 0 or file.tell() + length > size:
                raise _NotProtobufError
            has_graph |= number == _GRAPH and wire == _LENGTH
            if number != _METADATA_PROPS or wire != _LENGTH:
                file.seek(length, os.SEEK_CUR)
                continue
            taken += length
            if taken > MAX_METADATA_BYTES:
                raise CorruptError(f"{path}: over {MAX_METADATA_BYTES} bytes of metadata: not what dlops writes")
            key, value = _entry(file.read(length))
            entries[key] = value
        else:
            raise _NotProtobufError
    except (_NotProtobufError, UnicodeDecodeError):
        has_graph = False
    if not has_graph:
        raise CorruptError(f"{path}: no ONNX, OpenVINO or TorchScript file, or cut short")
    return entries


def _entry(content: bytes) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto."""
    texts, place = {_KEY: "", _VALUE: ""}, 0
    while place < len(content):
        tag, place = _varint_at(content, place)
        length, place = _varint_at(content, place)
        number, wire = divmod(tag, 8)
        if wire != _LENGTH or place + length > len(content):
            raise _NotProtobufError
        texts[number] = content[place : place + length].decode()
        place += length
    return texts[_KEY], texts[_VALUE]


def _varint(file: BinaryIO) -> int:
    content = bytearray()
    while len(content) < 10:
        byte = file.read(1)
        content += byte
        if not byte or byte[0] < 0x80:
            break
    return _varint_at(bytes(content), 0)[0]


def _varint_at(content: bytes, place: int) -> tuple[int, int]:
    """The number that begins at `place`, seven bits a byte, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            break
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise _NotProtobufError
