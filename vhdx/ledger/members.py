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
    Superblock,
    area_length,
    area_offset,
    parse_area,
    parse_superblock,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Found", "Side", "blank", "do_on_all", "read_area", "read_members"]


@dataclass
class Side:
    """A member as this process knows it."""

    member: Member
    superblock: Superblock
    in_step: bool = True
    error: VhdxError | None = None
    left_out: bool = False  # nothing is written to it, though it may work

    @property
    def inactive(self) -> int:
        return 1 - self.superblock.area

    @property
    def name(self) -> UUID:
        return self.superblock.members[self.superblock.index]

    def moved_to(self, members: tuple[UUID, ...]) -> Side:
        """The same member in another list."""
        superblock = replace(self.superblock, members=members, index=members.index(self.name))
        return Side(self.member, superblock, self.in_step, self.error, self.left_out)

    def read_again(self) -> bool:
        """Whether one that failed can be used again; what it holds is read from it."""
        if self.left_out:
            return False
        device = self.member.device
        try:
            device.flush()  # a device that lost a write stays poisoned
            now = _read_superblock(self.member)
        except VhdxError as error:
            self.error = error
            return False
        if now is None:
            return True  # it holds nothing that could be lost
        if now.ledger != self.superblock.ledger or now.members[now.index] != self.name:
            return False
        self.superblock = replace(now, members=self.superblock.members, index=self.superblock.index)
        return True

    def offset_in(self, area: int, at: int) -> int:
        return self.member.offset + area_offset(area, self.superblock.area_length) + at


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
        sides: with their records; None for one that has none. First those that have a ledger.
        lists: for each of those that have a ledger, the list of members that it knows.
    """

    sides: list[tuple[Side, Area | None]]
    lists: list[tuple[UUID, ...]]

    @property
    def areas(self) -> list[Area]:
        return [area for _, area in self.sides if area is not None]


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
            superblock = _read_superblock(member)
            one = None if superblock is None else _read_area(member, superblock)
        except UnsupportedError:
            raise  # without that member, what came after its last version would be undone
        except VhdxError as error:
            errors.append(error)
            continue
        if one is None or (identity is not None and one[0].superblock.ledger != identity):
            unknown.append((member, 0 if superblock is None else superblock.number))
            continue
        ledger, name = one[0].superblock.ledger, one[0].name
        if any(side.superblock.ledger != ledger for side, _ in found.values()):
            raise DamagedError("the devices belong to different ledgers", path=member.device.path)
        if name in found:
            raise DamagedError(
                "two devices are the same member of the ledger",
                path=member.device.path,
                hint="one of them is a copy: take it away",
            )
        found[name] = one
    if not found:
        if errors:
            raise errors[0]
        raise DamagedError("there is no ledger", path=members[0].device.path if members else None)
    newest = max(found.values(), key=lambda one: one[1].position)[0].superblock
    sides = [one for name, one in found.items() if name in newest.members]
    if 2 * len(sides) <= len(newest.members):
        why = f"; {errors[0]}" if errors else ""
        raise HostIOError(
            f"{len(sides)} of {len(newest.members)} members of the ledger are there; it needs more "
            f"than half{why}",
            reason=Reason.NO_QUORUM,
            hint="bring back the missing devices",
        )
    lists = [side.superblock.members for side, _ in sides]
    rejoining = [
        (Side(member, blank(newest, member, number)), None)
        for member, number in unknown
        if member.name in newest.members and member.name not in found
    ]
    moved = [(side.moved_to(newest.members), area) for side, area in sides]
    return Found([*moved, *rejoining], lists)


def blank(like: Superblock, member: Member, number: int) -> Superblock:
    """The superblock of a member whose region holds no ledger."""
    assert member.name is not None
    return replace(
        like,
        index=like.members.index(member.name),
        number=number,
        promised=0,
        term=0,
        first=0,
        area=1,
        area_length=area_length(member.length),
        base=(0, 0),
    )


def _read_superblock(member: Member) -> Superblock | None:
    blocks = [member.device.read(BLOCK, member.offset + i * BLOCK) for i in range(2)]
    parsed = [parse_superblock(block, member.length) for block in blocks]
    valid = [each for each in parsed if each is not None]
    return max(valid, key=lambda superblock: superblock.number, default=None)


def read_area(member: Member) -> Area | None:
    """What a member holds; None if it has no ledger."""
    superblock = _read_superblock(member)
    found = None if superblock is None else _read_area(member, superblock)
    return None if found is None else found[1]


def _read_area(member: Member, superblock: Superblock) -> tuple[Side, Area] | None:
    """None if it has no whole checkpoint."""
    side = Side(member, superblock)
    content = member.device.read(superblock.area_length, side.offset_in(superblock.area, 0))
    area = parse_area(content, superblock)
    return None if area is None else (side, area)
