# SPDX-License-Identifier: MIT
"""The beginning of a ledger: a new one, or the recovery of one that is there."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple
from uuid import UUID, uuid4

from vhdx import plane
from vhdx.errors import InvalidArgumentError, PoisonedError
from vhdx.ledger.layout import (
    BLOCK,
    MOST_MEMBERS,
    Member,
    Record,
    Superblock,
    area_length,
    check_region,
)
from vhdx.ledger.members import Side, overlap, read_members
from vhdx.ledger.writing import Writer

__all__ = ["Amend", "found", "recover"]

Amend = Callable[[list[Record], list[UUID], tuple[int, int], bool], list[Record]]
"""Gets the records, the members that missed commits, the base, and whether nothing is written to
these members; returns the records to be written."""


def first_term() -> int:
    """Of a new ledger: what an older one left in the regions must not continue it."""
    return 1 + secrets.randbits(40)


def found(
    writer_type: type[Writer],
    members: Sequence[Member],
    pool: plane.Pool,
    identity: UUID | None,
    names: Sequence[UUID] | None,
) -> Writer:
    """The writer of a new ledger; see :meth:`vhdx.ledger.Ledger.create`."""
    if not 1 <= len(members) <= MOST_MEMBERS:
        raise InvalidArgumentError(f"a ledger has 1 to {MOST_MEMBERS} members")
    for member in members:
        check_region(member)
    uuids = tuple(names) if names is not None else tuple(uuid4() for _ in members)
    if len(set(uuids)) != len(members):
        raise InvalidArgumentError("each member needs a name of its own")
    if any(a is not b and overlap(a, b) for a in members for b in members):
        raise InvalidArgumentError("two members share a region")
    ledger_uuid, term = identity or uuid4(), first_term()
    sides = [
        Side(
            member,
            uuids[index],
            index,
            Superblock(
                ledger_uuid, uuids, index, 0, term, term, 0, 1, area_length(member.length), (0, 0)
            ),
        )
        for index, member in enumerate(members)
    ]
    writer = writer_type(uuids, sides, pool)
    for block in range(2):
        offsets = [side.member.offset + block * BLOCK for side in sides]
        writer.write(sides, offsets, bytes(BLOCK))
    writer.write_checkpoint([[]], term, base=(0, 0))
    for side in sides:
        if side.error is not None:
            raise side.error
    return writer


class Start(NamedTuple):
    """What a recovery found, and has written everywhere.

    Attributes:
        writer: of the ledger.
        records: what was written, one after the other.
        out_of_step: indexes of members that are away, failed, or were not where the best one was.
        missed: names of members that lacked a commit that had succeeded.
        positions: where each member was: term, and sequence of its last group.
        base: a member that missed nothing is there or later.
    """

    writer: Writer
    records: list[Record]
    out_of_step: list[int]
    missed: list[UUID]
    positions: dict[UUID, tuple[int, int]]
    base: tuple[int, int]


def recover(
    writer_type: type[Writer],
    members: Sequence[Member],
    pool: plane.Pool,
    identity: UUID | None,
    amend: Amend | None,
) -> Start:
    """Recovers a ledger; see :meth:`vhdx.ledger.Ledger.recover`."""
    there = read_members(members, identity)
    voters = [side for side, _ in there.sides]
    sides = voters + there.rejoining
    writer = writer_type(there.members, sides, pool)
    writer.promise(max(side.superblock.promised for side in voters) + 1, voters)
    best, newest = max(
        ((area, side) for side, area in there.sides if side.in_step),
        key=lambda one: one[0].position,
    )
    if newest.superblock.members != there.members:
        raise PoisonedError("the member that knew the newest list of members failed: try again")
    missed = [side.name for side, area in there.sides if best.has_succeeded_since(area.position)]
    missed += [side.name for side in there.rejoining]
    records = [record for batch in best.batches() for record in batch]
    if amend is None:
        batches = [records]
        if writer.packed_length(batches) > best.length:
            batches = best.batches()  # as they are, they fit where they were
    else:
        left = all(writer.leave_out(name) for name in missed)
        records = amend(records, missed, best.next_base, left)
        batches = [records]
    writer.sequence = best.position[1] + 1
    term = max(side.superblock.promised for side in sides)
    writer.write_checkpoint(batches, term, base=best.next_base)
    behind = {side.index for side, area in there.sides if area.position != best.position}
    behind |= {side.index for side in there.rejoining}
    return Start(
        writer,
        records,
        sorted(behind.union(writer.out_of_step)),
        missed,
        {side.name: area.position for side, area in there.sides},
        best.next_base,
    )
