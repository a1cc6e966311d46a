# SPDX-License-Identifier: MIT
"""File type identifier and headers ([MS-VHDX] 2.2.1, 2.2.2)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from uuid import UUID

from vhdx.errors import DamagedError, Reason
from vhdx.format.checksum import seal, verify
from vhdx.units import KIB, MIB

__all__ = [
    "HEADER_OFFSETS",
    "HEADER_SECTION",
    "HEADER_SIZE",
    "IDENTIFIER_SIZE",
    "LARGEST_FILE",
    "NIL",
    "SIGNATURE",
    "Header",
    "choose_header",
    "pack_identifier",
    "parse_creator",
    "parse_header",
]

SIGNATURE = b"vhdxfile"
IDENTIFIER_SIZE = 64 * KIB
"""Bytes of the file type identifier, which is not written after creation (2.2.1)."""
HEADER_SECTION = 1 * MIB
"""Bytes of the section that holds identifier, headers and region tables (2.2)."""
HEADER_OFFSETS = (64 * KIB, 128 * KIB)
HEADER_SIZE = 4 * KIB
NIL = UUID(int=0)

_LAYOUT = struct.Struct("<4sIQ16s16s16sHHIQ")
assert _LAYOUT.size == 80
_CREATOR_BYTES = 512
LARGEST_FILE = 1 << 48
"""Bytes of the largest accepted file: 256 TiB, four times the largest disk."""
_LARGEST_SEQUENCE = (1 << 64) - (1 << 32)
_LARGEST_LOG = 256 * MIB  # limits what a hostile length makes us read


@dataclass(frozen=True)
class Header:
    """A valid header (2.2.2).

    Attributes:
        slot: 0 or 1, the header's position in the file.
        sequence_number: the header with the greater number is current.
        file_write_guid: replaced after an open, before the file is first changed.
        data_write_guid: replaced after an open, before a change that a guest could see.
        log_guid: nil when there is nothing to replay.
        log_version: 0.
        version: 1.
        log_offset: bytes, a multiple of 1 MiB.
        log_length: bytes, a multiple of 1 MiB.
    """

    slot: int
    sequence_number: int
    file_write_guid: UUID
    data_write_guid: UUID
    log_guid: UUID
    log_version: int
    version: int
    log_offset: int
    log_length: int

    def pack(self) -> bytes:
        """The 4 KiB on disk, with checksum."""
        data = bytearray(HEADER_SIZE)
        _LAYOUT.pack_into(
            data,
            0,
            b"head",
            0,
            self.sequence_number,
            self.file_write_guid.bytes_le,
            self.data_write_guid.bytes_le,
            self.log_guid.bytes_le,
            self.log_version,
            self.version,
            self.log_length,
            self.log_offset,
        )
        seal(data)
        return bytes(data)

    def successor(self, **changes: object) -> Header:
        """The next header, for the other slot."""
        return replace(
            self,
            slot=1 - self.slot,
            sequence_number=self.sequence_number + 1,
            **changes,  # type: ignore[arg-type]
        )


def pack_identifier(creator: str) -> bytes:
    """The 64 KiB of the identifier; ``creator`` is cut to 256 UTF-16 code units."""
    data = bytearray(IDENTIFIER_SIZE)
    data[:8] = SIGNATURE
    text = creator.encode("utf-16-le")[:_CREATOR_BYTES]
    data[8 : 8 + len(text)] = text
    return bytes(data)


def parse_creator(identifier: bytes) -> str:
    """The creator's name; it is informative only, so invalid UTF-16 is replaced."""
    text = identifier[8 : 8 + _CREATOR_BYTES].decode("utf-16-le", "replace")
    return text.partition("\0")[0]


def parse_header(data: bytes, slot: int) -> Header | None:
    """The header in ``data`` (4 KiB), or None if the signature or checksum is wrong."""
    if len(data) != HEADER_SIZE or data[:4] != b"head" or not verify(data):
        return None
    fields = _LAYOUT.unpack_from(data)
    _, _, sequence, file_write, data_write, log, log_version, version, length, offset = fields
    return Header(
        slot,
        sequence,
        UUID(bytes_le=file_write),
        UUID(bytes_le=data_write),
        UUID(bytes_le=log),
        log_version,
        version,
        offset,
        length,
    )


def choose_header(first: Header | None, second: Header | None) -> Header:
    """The current header (2.2.2): the only valid one, or the one with the greater number.

    Equal numbers are accepted if both headers have the same content; Disk2vhd writes such headers.

    Raises:
        DamagedError: neither header is valid, or the current one cannot be processed.
    """
    if first is None and second is None:
        raise DamagedError(
            "neither header is valid",
            reason=Reason.HEADERS,
            offset=HEADER_OFFSETS[0],
            hint="restore the image from a copy",
        )
    if first is None or (second is not None and second.sequence_number > first.sequence_number):
        assert second is not None
        header = second
    else:
        header = first
        if (
            second is not None
            and second.sequence_number == first.sequence_number
            and replace(second, slot=0) != first
        ):
            raise DamagedError(
                "both headers have the same sequence number and differ",
                reason=Reason.HEADERS,
                offset=HEADER_OFFSETS[0],
            )
    _check(header)
    return header


def _check(header: Header) -> None:
    where = HEADER_OFFSETS[header.slot]
    if header.sequence_number > _LARGEST_SEQUENCE:
        raise DamagedError(
            f"sequence number {header.sequence_number} has no successor",
            reason=Reason.HEADERS,
            offset=where + 8,
        )
    if header.version != 1:
        raise DamagedError(
            f"header version {header.version} is not 1",
            reason=Reason.HEADER_VERSION,
            offset=where + 66,
        )
    if header.log_version != 0 and header.log_guid != NIL:
        raise DamagedError(
            f"log version {header.log_version} is not 0",
            reason=Reason.LOG_VERSION,
            offset=where + 64,
        )
    if (
        header.log_offset % MIB
        or header.log_length % MIB
        or header.log_length > _LARGEST_LOG
        or (header.log_length and header.log_offset < HEADER_SECTION)
        or header.log_offset >= 1 << 62
        or (header.log_guid != NIL and header.log_length == 0)
    ):
        raise DamagedError(
            f"the log, {header.log_length:#x} bytes at {header.log_offset:#x}, is misplaced",
            reason=Reason.LOG_LOCATION,
            offset=where + 68,
        )
