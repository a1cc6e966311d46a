# SPDX-License-Identifier: MIT
"""CRC-32C (Castagnoli), the checksum of headers, region tables and log entries ([MS-VHDX] 2.2.2)."""

from __future__ import annotations

import struct

import google_crc32c

__all__ = ["crc32c", "seal", "verify"]

_FIELD = slice(4, 8)  # every checked structure keeps its checksum in bytes 4 to 7


def crc32c(data: bytes) -> int:
    """The checksum of ``data``."""
    return int(google_crc32c.value(data))


def seal(structure: bytearray) -> None:
    """Stores the checksum of ``structure``, computed with its own field zero."""
    structure[_FIELD] = bytes(4)
    structure[_FIELD] = struct.pack("<I", crc32c(bytes(structure)))


def verify(structure: bytes) -> bool:
    """Whether ``structure`` holds its own checksum."""
    copy = bytearray(structure)
    copy[_FIELD] = bytes(4)
    return struct.pack("<I", crc32c(bytes(copy))) == structure[_FIELD]
