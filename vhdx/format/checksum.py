# SPDX-License-Identifier: MIT
"""CRC-32C (Castagnoli), the checksum of headers, region tables and log entries ([MS-VHDX] 2.2.2)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import google_crc32c

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["crc32c", "seal", "sealed", "verify"]

_FIELD = slice(4, 8)  # every checked structure keeps its checksum in bytes 4 to 7

_PIECE = 32 << 10


def crc32c(data: bytes) -> int:
    """The checksum of ``data``."""
    return int(google_crc32c.value(data))


def seal(structure: bytearray) -> None:
    """Stores the checksum of ``structure``, computed with the checksum field zero."""
    structure[_FIELD] = bytes(4)
    structure[_FIELD] = struct.pack("<I", crc32c(bytes(structure)))


def sealed(structure: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Stores the checksum in ``structure``, whose checksum field must be zero, and returns it."""
    value = 0
    for start in range(0, len(structure), _PIECE):  # in pieces, to avoid a copy of the whole
        value = google_crc32c.extend(value, structure[start : start + _PIECE].tobytes())
    structure[_FIELD].view("<u4")[0] = value
    return structure


def verify(structure: bytes) -> bool:
    """Whether ``structure`` holds its own checksum."""
    copy = bytearray(structure)
    copy[_FIELD] = bytes(4)
    return struct.pack("<I", crc32c(bytes(copy))) == structure[_FIELD]
