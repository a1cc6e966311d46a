# SPDX-License-Identifier: MIT
"""The members of a ledger: what is read from each, and I/O to all of them at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from vhdx import plane
from vhdx.errors import DamagedError, HostIOError, Reason, UnsupportedError, VhdxError
from vhdx.ledger.layout import (
    BLOCK,
    Area,
    Member,
    Record,
    Superblock,
    area_length,
    area_offset,
    has_later_commit,
    parse_area,
    parse_superblock,
    supposed_superblock,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Found",
    "Side",
    "blank",
    "do_on_all",
    "look",
    "overlap",
    "position_of",
    "read_area",
    "read_members",
    "read_superblock",
]


@dataclass
class Side:
    """A member as this process knows it.

    Attributes:
        member: the region.
        name: its UUID.
        index: in the list of all members.
        superblock: the newest on the device; its list may be older.
        in_step: it has every record.
        error: why not.
        left_out: nothing is written to it, though it may work.
    """

    member: Member
    name: UUID
    index: int
    superblock: Superblock
    in_step: bool = True
    error: VhdxError | None = None
    left_out: bool = False

    @property
    def inactive(self) -> int:
        return 1 - self.superblock.area

    def moved_to(self, members: tuple[UUID, ...]) -> Side:
        """The same member in another list."""
        return replace(self, index=members.index(self.name))

    def read_again(self) -> bool:
        """Whether one that failed can be used again; what it holds is read from it."""
        if self.left_out:
            return False
        device = self.member.device
        try:
            device.flush()  # a device that lost a write stays poisoned
            now = read_superblock(self.member)
        except VhdxError as error:
            self.error = error
            return False
        if now is None:
            return True  # it holds nothing that could be lost
        if now.ledger != self.superblock.ledger or now.members[now.index] != self.name:
            return False
        self.superblock = now
        return True

    def offset_in(self, area: int, at: int) -> int:
        return self.member.offset + area_offset(area, self.superblock.area_length) + at


def overlap(a: Member, b: Member) -> bool:
    """Whether two regions share bytes of one device."""
    is_same = a.device is b.device or a.device.handle == b.device.handle
    return is_same and a.offset < b.offset + b.length and b.offset < a.offset + a.length


def do_on_all(
    pool: plane.Pool,
    sides: list[Side],
    operation: plane.Operation,
    offsets: list[int],
    data: bytes = b"",
) -> None:
    """Does one operation on all sides at once; one that fails is out of step from then on.

    Args:
        pool: lends threads.
        sides: members.
        operation: WRITE or FLUSH.
        offsets: bytes, on the device of each side.
        data: what to write.
    """
    if not sides:
        return
    targets = [(side.member.device, at) for side, at in zip(sides, offsets, strict=True)]
    outcome = plane.together(pool, operation, targets, data)
    for side, error in zip(sides, outcome, strict=True):
        if error is not None:
            side.in_step, side.error = False, error


class Found(NamedTuple):
    """The members that are there.

    Attributes:
        members: the list of all.
        sides: those that have the ledger, with their records.
        rejoining: those that have none, and are named.
    """

    members: tuple[UUID, ...]
    sides: list[tuple[Side, Area]]
    rejoining: list[Side]


class _Unsupported(Exception):
    """A superblock of a newer version."""


def read_members(members: Sequence[Member], identity: UUID | None) -> Found:
    """The members that are there; more than half of all have the ledger.

    Who belongs to all is what the member with the newest records says (see
    :mod:`vhdx.ledger.ledger`).
    """
    found: dict[UUID, tuple[Side, Area]] = {}
    unknown: list[tuple[Member, int]] = []
    errors: list[VhdxError] = []
    for member in members:
        try:
            superblock, area = _read(member, identity)
        except _Unsupported as error:  # without it, what came after its last version would be undone
            raise UnsupportedError(str(error), path=member.device.path) from error
        except VhdxError as error:
            errors.append(error)
            continue
        if superblock is None or area is None:
            unknown.append((member, 0 if superblock is None else superblock.number))
            continue
        name = superblock.members[superblock.index]
        if any(side.superblock.ledger != superblock.ledger for side, _ in found.values()):
            raise DamagedError("the devices belong to different ledgers", path=member.device.path)
        if name in found:
            raise DamagedError(
                "two devices are the same member of the ledger",
                path=member.device.path,
                hint="one of them is a copy: take it away",
            )
        found[name] = Side(member, name, superblock.index, superblock), area
    if not found:
        if errors:
            raise errors[0]
        raise DamagedError("there is no ledger", path=members[0].device.path if members else None)
    newest = max(found.values(), key=lambda one: one[1].position)[0].superblock
    sides = [
        (side.moved_to(newest.members), area)
        for name, (side, area) in found.items()
        if name in newest.members
    ]
    if 2 * len(sides) <= len(newest.members):
        why = f"; {errors[0]}" if errors else ""
        raise HostIOError(
            f"{len(sides)} of {len(newest.members)} members of the ledger are there; it needs more "
            f"than half{why}",
            reason=Reason.NO_QUORUM,
            hint="bring back the missing devices",
        )
    rejoining = [
        blank(newest, newest.members, member, number)
        for member, number in unknown
        if member.name in newest.members and member.name not in found
    ]
    return Found(newest.members, sides, rejoining)


def blank(like: Superblock, members: tuple[UUID, ...], member: Member, number: int) -> Side:
    """A member whose region holds no ledger, and whose last superblock had this number."""
    assert member.name is not None
    superblock = replace(
        like,
        members=members,
        index=members.index(member.name),
        number=number,
        promised=0,
        term=0,
        first=0,
        area=1,
        area_length=area_length(member.length),
        base=(0, 0),
    )
    return Side(member, member.name, superblock.index, superblock)


def _superblocks(member: Member, identity: UUID | None = None) -> list[Superblock | bool | None]:
    """Both superblocks; None for one that is damaged, False for one that was never written."""
    found: list[Superblock | bool | None] = []
    for i in range(2):
        block = member.device.read(BLOCK, member.offset + i * BLOCK)
        try:
            parsed = parse_superblock(block, member.length, identity)
        except UnsupportedError as error:
            raise _Unsupported(error.message) from error
        found.append(parsed if parsed is not None or any(block) else False)
    return found


def read_superblock(member: Member) -> Superblock | None:
    """The newest superblock of a member, of whatever ledger."""
    valid = [each for each in _superblocks(member) if isinstance(each, Superblock)]
    return max(valid, key=lambda superblock: superblock.number, default=None)


def _area_of(member: Member, superblock: Superblock, *, is_certain: bool = True) -> Area | None:
    at = member.offset + area_offset(superblock.area, superblock.area_length)
    content = member.device.read(superblock.area_length, at)
    area = parse_area(content, superblock)
    if area is not None and is_certain and has_later_commit(content, superblock, area):
        raise DamagedError(
            "a commit in the middle of the ledger is damaged, and later ones are not",
            path=member.device.path,
            hint="use another member of the ledger",
        )
    return area


def _read(member: Member, identity: UUID | None) -> tuple[Superblock | None, Area | None]:
    """The superblock that counts, and its records; None where there is none.

    If one superblock is damaged, its area may be newer than that of the other. That is certain if
    the area has more than a checkpoint: commits begin when the superblock is durable.
    """
    both = _superblocks(member, identity)
    valid = [each for each in both if isinstance(each, Superblock)]
    if not valid:
        return None, None
    superblock = max(valid, key=lambda each: each.number)
    if identity is not None and superblock.ledger != identity:
        return superblock, None
    area = _area_of(member, superblock)
    if None in both:
        at = member.offset + area_offset(1 - superblock.area, superblock.area_length)
        other = supposed_superblock(member.device.read(BLOCK, at), superblock)
        newer = None if other is None else _area_of(member, other)
        is_newer = newer is not None and (area is None or newer.position > area.position)
        if other is not None and newer is not None and is_newer and newer.has_commits:
            return other, newer
    return superblock, area


def read_area(member: Member) -> Area | None:
    """What a member holds; None if it has no ledger.

    Raises:
        VhdxError: it cannot be read, or is damaged.
    """
    try:
        return _read(member, None)[1]
    except _Unsupported as error:
        raise UnsupportedError(str(error), path=member.device.path) from error


def position_of(member: Member) -> tuple[int, int] | None:
    """Term and sequence of the last group that a member has; None if it has no ledger."""
    area = read_area(member)
    return None if area is None else area.position


def look(members: Sequence[Member], identity: UUID | None) -> tuple[list[Record], list[UUID]]:
    """What a recovery would find: the records, and members that lack a commit that had succeeded."""
    found = read_members(members, identity)
    best = max((area for _, area in found.sides), key=lambda area: area.position)
    missed = [s.name for s, area in found.sides if best.has_succeeded_since(area.position)]
    records = [record for batch in best.batches() for record in batch]
    return records, missed + [side.name for side in found.rejoining]
