# SPDX-License-Identifier: MIT
"""Log entries and the active sequence ([MS-VHDX] 2.3).

The log is a circular buffer of 4 KiB sectors. An entry consists of a header, descriptors, and a
data sector for each data descriptor. These functions take the log as bytes and do no I/O.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

from vhdx.arrays import np
from vhdx.format.checksum import sealed, verify
from vhdx.format.region import TABLE_OFFSETS
from vhdx.units import MIB

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "SECTOR",
    "Entry",
    "Patch",
    "Sequence",
    "entry_length",
    "find_active_sequence",
    "find_sequence",
    "guid_at",
    "pack_entry",
    "parse_entry",
    "patches_of",
]

SECTOR = 4096
_HEADER = struct.Struct("<4sIIIQII16sQQ")
_DATA = struct.Struct("<4s4s8sQQ")
_ZERO = struct.Struct("<4sIQQQ")
assert _HEADER.size == 64
assert _DATA.size == 32
assert _ZERO.size == 32
_FIRST_DESCRIPTOR = 64
_MOST_PATCHES = 1 << 17
_DESCRIPTOR = 32

_DATA_FIELDS = [
    ("signature", "S4"),
    ("trailing", "V4"),
    ("leading", "V8"),
    ("offset", "<u8"),
    ("seq", "<u8"),
]


@dataclass(frozen=True)
class Patch:
    """A change that replay makes: writes ``data``, or zeros if None; offset and length in bytes."""

    offset: int
    length: int
    data: bytes | None


@dataclass(frozen=True)
class Entry:
    """A valid entry (2.3.1).

    Attributes:
        offset: position in the log, bytes.
        length: bytes, a multiple of 4096.
        tail: offset in the log of the oldest entry that must be replayed with this one.
        sequence_number: 1 or more.
        flushed_file_offset: durable file size when the entry was written, bytes.
        last_file_offset: file size that holds all allocated structures, bytes.
        patches: the changes that the entry makes, in order.
    """

    offset: int
    length: int
    tail: int
    sequence_number: int
    flushed_file_offset: int
    last_file_offset: int
    patches: tuple[Patch, ...] = field(repr=False)


@dataclass(frozen=True)
class Sequence:
    """A valid sequence of entries (2.3.3), in order from the head's tail to the head."""

    entries: tuple[Entry, ...]

    @property
    def head(self) -> Entry:
        """The newest entry."""
        return self.entries[-1]


def _descriptor_sectors(count: int) -> int:
    return -(-(_FIRST_DESCRIPTOR + count * _DESCRIPTOR) // SECTOR)


def entry_length(pages: int) -> int:
    """Bytes of an entry with this number of data descriptors and no zero descriptors."""
    return (_descriptor_sectors(pages) + pages) * SECTOR


def pack_entry(
    guid: UUID,
    sequence_number: int,
    tail: int,
    offsets: npt.NDArray[np.uint64],
    pages: npt.NDArray[np.uint8],
    *,
    flushed_file_offset: int,
    last_file_offset: int,
) -> npt.NDArray[np.uint8]:
    """An entry that writes ``pages`` (n by 4096 bytes) at ``offsets`` (bytes) of the file."""
    count = len(offsets)
    descriptors = _descriptor_sectors(count) * SECTOR
    data = np.zeros(entry_length(count), np.uint8)
    _HEADER.pack_into(
        data.data,
        0,
        b"loge",
        0,
        len(data),
        tail,
        sequence_number,
        count,
        0,
        guid.bytes_le,
        flushed_file_offset,
        last_file_offset,
    )
    if count:
        table = np.zeros(count, np.dtype(_DATA_FIELDS))
        table["signature"] = b"desc"
        table["trailing"] = np.ascontiguousarray(pages[:, 4092:]).view("V4")[:, 0]
        table["leading"] = np.ascontiguousarray(pages[:, :8]).view("V8")[:, 0]
        table["offset"] = offsets
        table["seq"] = sequence_number
        raw = table.view(np.uint8)
        data[_FIRST_DESCRIPTOR : _FIRST_DESCRIPTOR + len(raw)] = raw
        sectors = data[descriptors:].reshape(count, SECTOR)
        sectors[:, 8:4092] = pages[:, 8:4092]
        sectors[:, :4] = np.frombuffer(b"data", np.uint8)
        halves = struct.pack("<II", sequence_number >> 32, sequence_number & 0xFFFFFFFF)
        sectors[:, 4:8] = np.frombuffer(halves[:4], np.uint8)
        sectors[:, 4092:] = np.frombuffer(halves[4:], np.uint8)
    return sealed(data)


def guid_at(log: bytes, offset: int) -> UUID:
    """The LogGuid in the entry header at ``offset``; the entry need not be valid."""
    return UUID(bytes_le=bytes(_HEADER.unpack_from(log, offset)[7]))


def _circular(log: bytes, offset: int, length: int) -> bytes:
    part = log[offset : offset + length]
    return part if len(part) == length else part + log[: length - len(part)]


def _parse_patches(
    data: bytes, count: int, sequence_number: int, log_span: tuple[int, int]
) -> tuple[Patch, ...] | None:
    at = _descriptor_sectors(count) * SECTOR
    patches = []
    for i in range(count):
        where = _FIRST_DESCRIPTOR + i * _DESCRIPTOR
        signature = data[where : where + 4]
        content: bytes | None
        if signature == b"desc":
            _, trailing, leading, offset, number = _DATA.unpack_from(data, where)
            sector = data[at : at + SECTOR]
            if len(sector) != SECTOR or sector[:4] != b"data":
                return None
            high, low = (
                struct.unpack_from("<I", sector, 4)[0],
                struct.unpack_from("<I", sector, 4092)[0],
            )
            if high << 32 | low != sequence_number:
                return None
            content = leading + sector[8:4092] + trailing
            length = SECTOR
            at += SECTOR
        elif signature == b"zero":
            _, _, length, offset, number = _ZERO.unpack_from(data, where)
            content = None
        else:
            return None
        bad = (
            number != sequence_number
            or offset % SECTOR
            or length % SECTOR
            or offset < TABLE_OFFSETS[0]
            or offset + length >= 1 << 63
            or (offset < log_span[1] and offset + length > log_span[0])
        )
        if bad:
            return None
        patches.append(Patch(offset, length, content))
    return tuple(patches) if at == len(data) else None


def parse_entry(log: bytes, offset: int, guid: UUID, log_offset: int) -> Entry | None:
    """The entry at ``offset`` of ``log``, or None if no valid entry with this GUID begins there.

    Args:
        log: the whole log.
        offset: bytes, a multiple of 4096.
        guid: the header's LogGuid.
        log_offset: the log's offset in the file; no entry may change the log itself.
    """
    if log[offset : offset + 4] != b"loge":
        return None
    fields = _HEADER.unpack_from(log, offset)
    _, _, length, tail, number, count, _, entry_guid, flushed, last = fields
    if (
        entry_guid != guid.bytes_le
        or length == 0
        or length % SECTOR
        or length > len(log)
        or tail % SECTOR
        or tail >= len(log)
        or number == 0
        or count > _MOST_PATCHES
        or _descriptor_sectors(count) * SECTOR > length
    ):
        return None
    data = _circular(log, offset, length)
    if not verify(data):
        return None
    patches = _parse_patches(data, count, number, (log_offset, log_offset + len(log)))
    if patches is None:
        return None
    return Entry(offset, length, tail, number, flushed, last, patches)


def _run_from(log: bytes, start: int, guid: UUID, log_offset: int, budget: list[int]) -> list[Entry]:
    """The longest run of entries with consecutive numbers that begins at ``start``."""
    run: list[Entry] = []
    offset, used, patches = start, 0, 0
    while used < len(log) and budget[0] > 0:
        entry = parse_entry(log, offset, guid, log_offset)
        budget[0] -= _claimed_length(log, offset) if entry is None else entry.length
        if entry is None or (run and entry.sequence_number != run[-1].sequence_number + 1):
            break
        used += entry.length
        patches += len(entry.patches)
        if used > len(log) or patches > _MOST_PATCHES:
            break  # it overlaps its own beginning, or has too many patches
        run.append(entry)
        offset = (offset + entry.length) % len(log)
    return run


def _claimed_length(log: bytes, offset: int) -> int:
    if log[offset : offset + 4] != b"loge":
        return 0
    return min(int(_HEADER.unpack_from(log, offset)[2]), len(log))


def find_active_sequence(log: bytes, guid: UUID, log_offset: int) -> Sequence | None:
    """The valid sequence with the greatest head (2.3.3), cut to begin at the head's tail.

    Returns:
        None if the log holds no valid sequence.
    """
    best: Sequence | None = None
    start = 0
    # A hostile log may claim long entries everywhere; a normal log is read about twice.
    budget = [8 * len(log) + 16 * MIB]
    while start < len(log):
        run = _run_from(log, start, guid, log_offset, budget)
        if not run:
            start += SECTOR
            continue
        offsets = [entry.offset for entry in run]
        head = run[-1]
        if head.tail in offsets and (
            best is None or head.sequence_number > best.head.sequence_number
        ):
            best = Sequence(tuple(run[offsets.index(head.tail) :]))
        following = (head.offset + head.length) % len(log)
        if following <= start:
            break  # the run wrapped around: no other start is left
        start = following
    return best


def find_sequence(log: bytes, guid: UUID, log_offset: int, number: int) -> Sequence | None:
    """The valid sequence whose last entry has this sequence number, active or not."""
    budget = [8 * len(log) + 16 * MIB]
    for start in range(0, len(log), SECTOR):
        run = _run_from(log, start, guid, log_offset, budget)
        numbers = [entry.sequence_number for entry in run]
        if number not in numbers:
            continue
        run = run[: numbers.index(number) + 1]
        offsets = [entry.offset for entry in run]
        if run[-1].tail in offsets:
            return Sequence(tuple(run[offsets.index(run[-1].tail) :]))
    return None


def patches_of(sequence: Sequence) -> list[Patch]:
    """All changes that replay makes, in order; later changes override earlier ones."""
    return [patch for entry in sequence.entries for patch in entry.patches]
