# SPDX-License-Identifier: MIT
"""The members of a ledger: what is read from each, and I/O to all of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.errors import DamagedError, HostIOError, Reason, UnsupportedError, VhdxError
from vhdx.ledger.layout import (
    BLOCK,
    Area,
    Member,
    Superblock,
    area_offset,
    parse_area,
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

    def read_again(self) -> bool:
        """Whether one that failed can be used again; what it holds is read from it."""
        device = self.member.device
        try:
            device.flush()  # a device that lost a write stays poisoned
            now = _read_superblock(self.member)
        except VhdxError as error:
            self.error = error
            return False
        if now is None:
            return True  # it holds nothing that could be lost
        if (now.ledger, now.index) != (self.superblock.ledger, self.superblock.index):
            return False
        self.superblock = now
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


def read_members(members: Sequence[Member], identity: UUID | None) -> list[tuple[Side, Area]]:
    """The members that have the ledger, with their records; more than half of them all."""
    found: dict[int, tuple[Side, Area]] = {}
    errors: list[VhdxError] = []
    for member in members:
        try:
            one = _read_member(member)
        except UnsupportedError:
            raise  # without that member, what came after its last version would be undone
        except VhdxError as error:
            errors.append(error)
            continue
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
        if errors:
            raise errors[0]
        raise DamagedError("there is no ledger", path=members[0].device.path if members else None)
    count = len(next(iter(found.values()))[0].superblock.members)
    if 2 * len(found) <= count:
        why = f"; {errors[0]}" if errors else ""
        raise HostIOError(
            f"{len(found)} of {count} members of the ledger are there; it needs more than half{why}",
            reason=Reason.NO_QUORUM,
            hint="bring back the missing devices",
        )
    return list(found.values())


def _read_superblock(member: Member) -> Superblock | None:
    blocks = [member.device.read(BLOCK, member.offset + i * BLOCK) for i in range(2)]
    parsed = [parse_superblock(block, member.length) for block in blocks]
    valid = [each for each in parsed if each is not None]
    return max(valid, key=lambda superblock: superblock.number, default=None)


def _read_member(member: Member) -> tuple[Side, Area] | None:
    """None if it has no whole checkpoint."""
    superblock = _read_superblock(member)
    if superblock is None:
        return None
    side = Side(member, superblock)
    content = member.device.read(superblock.area_length, side.offset_in(superblock.area, 0))
    area = parse_area(content, superblock)
    return None if area is None else (side, area)
