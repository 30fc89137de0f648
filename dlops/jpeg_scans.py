"""How many scans a JPEG has, from its markers alone: a progressive file may repeat one as often as it likes.

Each costs the decoder a pass over the whole picture and the file a hundred bytes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Encoders make ten or so; what has more is no photo.
MOST = 100
# Within a scan's data 0xFF is followed by 0x00, or by a restart marker.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_BEGINS, _ENDS, _SCAN, _ALONE = 0xD8, 0xD9, 0xDA, 0x01


class Scans(NamedTuple):
    """scans: at most MOST + 1, where counting ends. ended: the marker of the picture's end was there."""

    scans: int
    ended: bool


def count_scans(content: bytes) -> Scans:
    """Of a JPEG, as the decoder meets them; previews inside its metadata are not among them."""
    place, scans = 2, 0
    while scans <= MOST and (found := _MARKER.search(content, place)):
        code, place = found[1][0], found.end()
        if code == _ENDS:
            return Scans(scans, ended=True)
        if code in (_BEGINS, _ALONE):
            continue
        scans += code == _SCAN
        place += max(2, int.from_bytes(content[place : place + 2], "big"))
    return Scans(scans, ended=False)
