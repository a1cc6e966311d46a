# SPDX-License-Identifier: MIT
"""The members of a ledger: what is read from each, and I/O to all of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.errors import DamagedError, HostIOError, Reason, VhdxError
from vhdx.ledger.layout import (
    BLOCK,
    Group,
    Member,
    Superblock,
    area_offset,
    parse_groups,
    parse_superblock,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

__all__ = ["Side", "do_on_all", "read_members"]


@dataclass
class Side:
    """A member as this process knows it."""

    member: Member
    superblock: Superblock
    in_step: bool = True
    error: VhdxError | None = None

    @property
    def inactive(self) -> int:
        return 1 - self.superblock.area

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


def read_members(members: Sequence[Member], identity: UUID | None) -> list[tuple[Side, list[Group]]]:
    """The members that have the ledger, with their records; more than half of them all."""
    found: dict[int, tuple[Side, list[Group]]] = {}
    for member in members:
        one = _read_member(member)
        if one is None or (identity is not None and one[0].superblock.ledger != identity):
            continue
        superblock = one[0].superblock
        other = next((side.superblock for side, _ in found.values()), superblock)
        if (superblock.ledger, superblock.members) != (other.ledger, other.members):
            raise DamagedError("the devices belong to different ledgers", path=member.device.path)
        if superblock.index in found:
            raise DamagedError(
                "two devices are the same member of the ledger",
                path=member.device.path,
                hint="one of them is a copy: take it away",
            )
        found[superblock.index] = one
    if not found:
        raise DamagedError("there is no ledger", path=members[0].device.path if members else None)
    count = len(next(iter(found.values()))[0].superblock.members)
    if 2 * len(found) <= count:
        raise HostIOError(
            f"{len(found)} of the ledger's {count} members are there, and more than half must be",
            reason=Reason.NO_QUORUM,
            hint="bring back the missing devices",
        )
    return list(found.values())


def _read_member(member: Member) -> tuple[Side, list[Group]] | None:
    """None if it cannot be read, or has no whole checkpoint."""
    device = member.device
    try:
        blocks = [device.read(BLOCK, member.offset + i * BLOCK) for i in range(2)]
        parsed = [parse_superblock(block, member.length) for block in blocks]
        superblock = max(
            (each for each in parsed if each is not None), key=lambda s: s.number, default=None
        )
        if superblock is None:
            return None
        side = Side(member, superblock)
        area = device.read(superblock.area_length, side.offset_in(superblock.area, 0))
    except VhdxError:
        return None
    groups = parse_groups(area, superblock)
    return (side, groups) if groups else None
