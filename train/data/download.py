"""A file from the network, once: whole and with the right digest, or not there at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dlops.console import Bar, progress_bar, say
from dlops.errors import CorruptError, MachineError, first_line, from_os_error

DATA_DIR = Path("data")
_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0

Algorithm = Literal["md5", "sha256"]


def fetch(urls: Sequence[str], into: Path, *, algorithm: Algorithm, digest: str) -> Path:
    """`into`, downloaded from the first of `urls` that answers unless it is there with that digest already.

    The digests are the publishers' own, some of them MD5: they tell a damaged file from a whole one. Raises
    MachineError without a network, CorruptError where what arrived is not the file.
    """
    if into.is_file():
        if file_digest(into, algorithm) == digest:
            return into
        say(f"{into}: not the published file ({algorithm} differs); downloading it again")
    partial = into.with_name(f".{into.name}.{os.getpid()}.partial")
    reasons = []
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        for url in urls:
            try:
                _download(url, partial)
            except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
                reasons.append(f"{url}: {_reason(error)}")
                continue
            found = file_digest(partial, algorithm)
            if found != digest:
                raise CorruptError(
                    f"{url}: {algorithm} is {found}, published is {digest}", hint=f"put the right file at {into}"
                )
            os.replace(partial, into)
            return into
    except OSError as error:
        raise from_os_error(error, doing=f"downloading {into.name}") from error
    finally:
        partial.unlink(missing_ok=True)
    raise MachineError(
        f"could not download {into.name}: {'; '.join(reasons)}",
        hint=f"without a network, put the file at {into}; --set data=digits needs no download",
    )


def file_digest(path: Path, algorithm: Algorithm) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, http.client.HTTPException):
        return f"not an answer in HTTP ({type(error).__name__}: {first_line(error)})"
    return str(getattr(error, "reason", error))


def _download(url: str, into: Path) -> None:
    # S310: the addresses are constants of ours, and the digest decides what is kept.
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer, into.open("wb") as file:  # noqa: S310
        length = answer.headers.get("Content-Length") or ""
        # Not every server sends a number; the digest decides then, as it does where none is sent.
        total = int(length) if length.isdecimal() else 0
        with progress_bar(f"downloading {into.name.strip('.').split('.', 1)[0]}", total=total >> 20) as bar:
            _copy(answer.read, file.write, bar)
        file.flush()
        os.fsync(file.fileno())
        if total and file.tell() != total:
            raise ConnectionError(f"the connection ended after {file.tell()} of {total} bytes")


def _copy(read: object, write: object, bar: Bar) -> None:
    assert callable(read)
    assert callable(write)
    while chunk := read(_CHUNK_BYTES):
        write(chunk)
        bar.advance(note="MB")
