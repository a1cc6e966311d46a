# SPDX-License-Identifier: MIT
"""What a ledger looks like on a device: superblocks, areas, groups of records. No I/O.

A ledger has a region of each member device. The region begins with two superblocks of 4 KiB, which
are written in turn. Two areas follow, which also take turns. The current area begins with a
checkpoint: records that stand for everything before. Groups of records that were committed since
follow it. All numbers are little-endian.

Superblock (4096 bytes)::

    0  signature "vlsb"          4  CRC-32C of all, this field zero
    8  version (1)              12  index of this member in the list
   16  ledger (UUID)            32  number: one more than that of the last superblock
   40  promised: a term         48  term of the current area
   56  sequence of the first group of the current area
   64  bytes of an area         72  current area, 0 or 1     76  count of members
   80  base: a term             88  and a sequence
   96  members (UUID each, at most 250)

Group (a multiple of 4096 bytes, at a multiple of 4096)::

    0  signature "vlgr"          4  CRC-32C of all, this field zero
    8  bytes of the group       12  bytes of its records
   16  ledger (UUID)            32  term
   40  sequence
   48  flags: 1 part of a checkpoint, 2 its end, 4 the first group of a checkpoint or commit
   52  CRC-32C of the group before it in the area, or 0
   56  records: kind (u32), bytes (u32), payload, zeros up to a multiple of 8

Recovery. A superblock counts if its checksum is right and its version is known; of the two, that with
the higher number. The area is then read from its start up to the first group that is damaged, belongs
to another ledger or term, is not the next in sequence, or does not name the checksum of the group
before it. Groups are never overwritten while their area is current, so a commit that was interrupted
damages nothing but itself. See :mod:`vhdx.ledger.ledger` for several members.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple
from uuid import UUID

from vhdx import plane
from vhdx.errors import InvalidArgumentError, UnsupportedError
from vhdx.format.checksum import seal, verify
from vhdx.units import MIB, round_up

__all__ = [
    "BLOCK",
    "LARGEST_RECORD",
    "MOST_MEMBERS",
    "SMALLEST_REGION",
    "Area",
    "Member",
    "Record",
    "Superblock",
    "area_length",
    "area_offset",
    "check_record",
    "check_region",
    "has_later_commit",
    "pack_groups",
    "parse_area",
    "parse_superblock",
    "supposed_superblock",
]

BLOCK = 4096
SMALLEST_REGION = 4 * BLOCK
LARGEST_RECORD = MIB
MOST_MEMBERS = (BLOCK - 96) // 16
_LARGEST_GROUP = 2 * MIB
_VERSION = 1
_LARGEST_NUMBER = 1 << 62  # of a superblock, term or group: no real ledger comes near
_SUPERBLOCK = struct.Struct("<4sIII16sQQQQQIIQQ")
_GROUP = struct.Struct("<4sIII16sQQII")
_RECORD = struct.Struct("<II")
_CHECKPOINT, _END, _FIRST = 1, 2, 4


class Member(NamedTuple):
    """The part of a device that a ledger uses.

    Attributes:
        device: the device.
        offset: bytes, a multiple of 4096.
        length: bytes, at least 16 KiB.
        name: which member it is, if the caller knows. A recovery then makes it a member again even if
            its region holds no ledger any more.
    """

    device: plane.Device
    offset: int
    length: int
    name: UUID | None = None


class Record(NamedTuple):
    """What an owner of a ledger records.

    Attributes:
        kind: the owner's, 0 to 2**32 - 1.
        payload: at most 1 MiB.
    """

    kind: int
    payload: bytes


@dataclass(frozen=True)
class Superblock:
    """Where a member's records are, and the highest term that a recovery has claimed here.

    Every commit that succeeded before the current checkpoint is in a member at ``base`` or later.
    """

    ledger: UUID
    members: tuple[UUID, ...]
    index: int
    number: int
    promised: int
    term: int
    first: int
    area: int
    area_length: int
    base: tuple[int, int]

    def pack(self) -> bytes:
        """The block as written."""
        head = _SUPERBLOCK.pack(
            b"vlsb", 0, _VERSION, self.index, self.ledger.bytes, self.number, self.promised,
            self.term, self.first, self.area_length, self.area, len(self.members), *self.base,
        )  # fmt: skip
        block = bytearray(head + b"".join(m.bytes for m in self.members))
        block.extend(bytes(BLOCK - len(block)))
        seal(block)
        return bytes(block)


def parse_superblock(block: bytes, region: int, identity: UUID | None = None) -> Superblock | None:
    """The superblock, or None if this is none.

    Args:
        block: 4096 bytes.
        region: bytes of the member's region.
        identity: one of another ledger may have a newer version.

    Raises:
        UnsupportedError: it was written by a newer version.
    """
    fields = _SUPERBLOCK.unpack_from(block)
    signature, _, version, index, ledger, number, promised, term, first, length, area, count = fields[
        :12
    ]
    if signature != b"vlsb" or not verify(block):
        return None
    is_foreign = identity is not None and ledger != identity.bytes
    if (
        version > _VERSION and not is_foreign
    ):  # to fall back on an older superblock would undo what came after it
        raise UnsupportedError(f"the ledger has version {version}, and this program knows {_VERSION}")
    if version != _VERSION or max(number, promised, term, first, *fields[12:]) >= _LARGEST_NUMBER:
        return None
    if area > 1 or not 1 <= count <= MOST_MEMBERS or index >= count or length != area_length(region):
        return None
    raw = [block[96 + 16 * i : 112 + 16 * i] for i in range(count)]
    members = tuple(UUID(bytes=each) for each in raw)
    return Superblock(
        UUID(bytes=ledger), members, index, number, promised, term, first, area, length, fields[12:]
    )


def area_length(region: int) -> int:
    """Bytes of each of the two areas in a region of so many bytes."""
    return (region - 2 * BLOCK) // 2 // BLOCK * BLOCK


def area_offset(area: int, length: int) -> int:
    """Where an area begins in the region."""
    return 2 * BLOCK + area * length


def check_region(member: Member) -> None:
    """Raises InvalidArgumentError for a region that cannot hold a ledger."""
    end = member.offset + member.length
    if member.length < SMALLEST_REGION or member.offset % BLOCK or end > member.device.size:
        raise InvalidArgumentError(
            f"the region of a ledger has at least {SMALLEST_REGION} bytes, begins at a multiple of "
            f"{BLOCK}, and ends inside the device",
            path=member.device.path,
        )


@dataclass(frozen=True)
class _Group:
    """Records that became durable together."""

    sequence: int
    flags: int
    checksum: int
    length: int
    body: bytes


@dataclass(frozen=True)
class Area:
    """The groups of an area that count.

    Attributes:
        position: term, and sequence of the last group.
        length: bytes of the groups.
        base: of the superblock.
    """

    position: tuple[int, int]
    length: int
    base: tuple[int, int]
    _groups: tuple[_Group, ...]

    @property
    def _commits(self) -> list[int]:
        """The sequences at which the checkpoint and each commit begin."""
        return [group.sequence for group in self._groups if group.flags & _FIRST]

    def has_succeeded_since(self, position: tuple[int, int]) -> bool:
        """Whether a commit succeeded that a member at this older position does not have.

        The last commit may not have succeeded, so a member may lack it without having failed.
        """
        later = [first for first in self._commits if (self.position[0], first) > position]
        return position < self.base or len(later) > 1

    @property
    def has_commits(self) -> bool:
        """Whether it has more than a checkpoint."""
        return len(self._commits) > 1

    @property
    def next_base(self) -> tuple[int, int]:
        """The base of a checkpoint that a recovery writes: the last commit may not have succeeded."""
        last = self._commits[-1]
        return self.base if len(self._commits) == 1 else (self.position[0], last - 1)

    def batches(self) -> list[list[Record]]:
        """The records, group by group."""
        return [list(_parse_records(group.body)) for group in self._groups]


def check_record(record: Record) -> None:
    """Raises InvalidArgumentError for a record that cannot be stored."""
    kind: object = record.kind  # callers without type checks may pass anything
    if not isinstance(kind, int) or not 0 <= kind < 1 << 32 or len(record.payload) > LARGEST_RECORD:
        raise InvalidArgumentError("a record has a kind of 32 bits and at most 1 MiB")


def pack_groups(
    batches: Iterable[Iterable[Record]],
    *,
    ledger: UUID,
    term: int,
    sequence: int,
    before: int,
    is_checkpoint: bool,
) -> tuple[bytes, int, int]:
    """Groups that hold the records; one without records for an empty checkpoint.

    Args:
        batches: records, in order; a group holds records of one batch.
        ledger: its UUID.
        term: of the area.
        sequence: of the first group.
        before: the checksum of the group before it in the area, or 0.
        is_checkpoint: these groups are a checkpoint.

    Returns:
        Their bytes, the sequence after them, and the checksum of the last.
    """
    bodies = [body for records in batches for body in _bodies(records)]
    if not bodies and is_checkpoint:
        bodies.append(b"")
    parts = []
    for number, body in enumerate(bodies):
        flags = _CHECKPOINT if is_checkpoint else 0
        flags |= _END if is_checkpoint and number == len(bodies) - 1 else 0
        flags |= _FIRST if number == 0 else 0
        length = round_up(_GROUP.size + len(body), BLOCK)
        head = _GROUP.pack(b"vlgr", 0, length, len(body), ledger.bytes, term, sequence, flags, before)
        group = bytearray(head + body)
        group.extend(bytes(length - len(group)))
        seal(group)
        before = int.from_bytes(group[4:8], "little")
        sequence += 1
        parts.append(bytes(group))
    return b"".join(parts), sequence, before


def _bodies(records: Iterable[Record]) -> Iterator[bytes]:
    body = bytearray()
    for record in records:
        packed = _pack_record(record)
        if body and len(body) + len(packed) > _LARGEST_GROUP - _GROUP.size:
            yield bytes(body)
            body.clear()
        body.extend(packed)
    if body:
        yield bytes(body)


def _pack_record(record: Record) -> bytes:
    check_record(record)
    head = _RECORD.pack(record.kind, len(record.payload))
    return head + record.payload + bytes(-len(record.payload) % 8)


def parse_area(area: bytes, superblock: Superblock) -> Area | None:
    """The groups of an area that count. None if its checkpoint is not whole."""
    found: list[_Group] = []
    at, before, sequence = 0, 0, superblock.first
    while (group := _parse_group(area, at, superblock, sequence, before)) is not None:
        found.append(group)
        at, before, sequence = at + group.length, group.checksum, sequence + 1
    if not any(group.flags & _END for group in found) or not found[0].flags & _FIRST:
        return None
    return Area((superblock.term, sequence - 1), at, superblock.base, tuple(found))


def has_later_commit(content: bytes, superblock: Superblock, area: Area) -> bool:
    """Whether a commit follows behind the groups that count: then something in between is damaged.

    A commit that was cut off may have left any of its groups, but no later commit.
    """
    wanted = (b"vlgr", superblock.ledger.bytes, superblock.term)
    for at in range(area.length, len(content) - BLOCK + 1, BLOCK):
        signature, _, length, _, ledger, term, number, flags, _ = _GROUP.unpack_from(content, at)
        if (signature, ledger, term) != wanted or number <= area.position[1] + 1:
            continue
        if flags & _FIRST and length <= len(content) - at and verify(content[at : at + length]):
            return True
    return False


def supposed_superblock(block: bytes, other: Superblock) -> Superblock | None:
    """The superblock of an area that begins with this block, if its own was damaged."""
    signature, _, _, _, ledger, term, number, flags, _ = _GROUP.unpack_from(block)
    is_checkpoint = flags & _CHECKPOINT and flags & _FIRST
    if signature != b"vlgr" or ledger != other.ledger.bytes or not is_checkpoint:
        return None
    return replace(
        other,
        number=other.number + 1,
        promised=max(other.promised, term),
        term=term,
        first=number,
        area=1 - other.area,
        base=(0, 0),
    )


def _parse_group(
    area: bytes, at: int, superblock: Superblock, sequence: int, before: int
) -> _Group | None:
    if at + BLOCK > len(area):
        return None
    signature, checksum, length, used, ledger, term, number, flags, previous = _GROUP.unpack_from(
        area, at
    )
    if signature != b"vlgr" or ledger != superblock.ledger.bytes or term != superblock.term:
        return None
    if number != sequence or previous != before or length % BLOCK:
        return None
    if not 0 < length <= min(len(area) - at, _LARGEST_GROUP + BLOCK) or used > length - _GROUP.size:
        return None
    if not verify(area[at : at + length]):
        return None
    body = area[at + _GROUP.size : at + _GROUP.size + used]
    return _Group(sequence, flags, checksum, length, body) if _is_whole(body) else None


def _is_whole(body: bytes) -> bool:
    """Whether the body is a series of records."""
    at = 0
    while at < len(body):
        if len(body) - at < _RECORD.size:
            return False
        at = round_up(at + _RECORD.size + _RECORD.unpack_from(body, at)[1], 8)
    return at == len(body)


def _parse_records(body: bytes) -> Iterator[Record]:
    at = 0
    while at < len(body):
        kind, length = _RECORD.unpack_from(body, at)
        start, at = at + _RECORD.size, round_up(at + _RECORD.size + length, 8)
        yield Record(kind, body[start : start + length])
