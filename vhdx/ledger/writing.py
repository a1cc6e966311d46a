# SPDX-License-Identifier: MIT
"""Writes commits, checkpoints and superblocks of a ledger to all of its members at once."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from vhdx import plane
from vhdx.errors import InvalidArgumentError, NoSpaceError, PoisonedError
from vhdx.ledger.layout import (
    BLOCK,
    MOST_MEMBERS,
    Member,
    Record,
    Superblock,
    area_length,
    check_region,
    pack_groups,
)
from vhdx.ledger.members import Side, blank, do_on_all, overlap, read_superblock

__all__ = ["Writer"]


class Writer:
    """Where the next group of a ledger goes. One thread at a time uses it.

    A method that raises after ``touched`` became True leaves the members in an unknown state. Then
    nothing may be written any more before a recovery.

    Args:
        members: names of all.
        sides: the members that are there.
        pool: lends threads for I/O to several members at once.

    Attributes:
        touched: a write has begun; whoever begins an operation sets it to False.
        members: names of all, also of those that are away.
        sequence: of the next group.
    """

    def __init__(self, members: tuple[UUID, ...], sides: list[Side], pool: plane.Pool) -> None:
        first = sides[0].superblock
        self.identity, self.members = first.ledger, members
        self.sides, self._pool = sides, pool
        self.term, self.sequence, self._before, self.tail = first.term, first.first, 0, 0
        self.touched = False

    @property
    def room(self) -> int:
        """Bytes left in the current area."""
        return self.capacity() - self.tail

    @property
    def out_of_step(self) -> list[int]:
        """Indexes of members that failed, or that are away."""
        present = {side.index for side in self.sides if side.in_step}
        return sorted(set(range(len(self.members))) - present)

    def in_step(self) -> list[Side]:
        return [side for side in self.sides if side.in_step]

    def capacity(self) -> int:
        return min(side.superblock.area_length for side in self.in_step() or self.sides)

    def make_durable(self, sides: list[Side], what: str) -> list[Side]:
        """A barrier on those that are in step; returns those where it succeeded."""
        del what  # which barrier it is, for tests
        sides = [side for side in sides if side.in_step]
        do_on_all(self._pool, sides, plane.Operation.FLUSH, [0] * len(sides))
        return [side for side in sides if side.in_step]

    def _need_most(self, sides: list[Side]) -> None:
        if 2 * len(sides) > len(self.members):
            return
        errors = [side.error for side in self.sides if side.error is not None]
        raise PoisonedError(
            f"only {len(sides)} of {len(self.members)} members could be written; more than half "
            f"must be: {errors[0] if errors else 'the others are away'}"
        )

    def write(self, sides: list[Side], offsets: list[int], data: bytes) -> None:
        self.touched = True
        do_on_all(self._pool, sides, plane.Operation.WRITE, offsets, data)

    def write_commit(self, records: list[Record]) -> None:
        data, sequence, before = pack_groups(
            [records],
            ledger=self.identity,
            term=self.term,
            sequence=self.sequence,
            before=self._before,
            is_checkpoint=False,
        )
        if self.tail + len(data) > self.capacity():
            raise NoSpaceError("the ledger is full", hint="write a checkpoint")
        sides = self.in_step()
        offsets = [side.offset_in(side.superblock.area, self.tail) for side in sides]
        self.write(sides, offsets, data)
        self._need_most(self.make_durable(sides, "commit"))
        self.tail += len(data)
        self.sequence, self._before = sequence, before

    def packed_length(self, batches: list[list[Record]]) -> int:
        return len(self._pack_checkpoint(batches, 0)[0])

    def _pack_checkpoint(self, batches: list[list[Record]], term: int) -> tuple[bytes, int, int]:
        return pack_groups(
            batches,
            ledger=self.identity,
            term=term,
            sequence=self.sequence,
            before=0,
            is_checkpoint=True,
        )

    def write_checkpoint(
        self,
        batches: list[list[Record]],
        term: int,
        joining: Side | None = None,
        base: tuple[int, int] | None = None,
    ) -> None:
        """Writes a checkpoint, and makes its area the current one.

        Args:
            batches: the records.
            term: of the area.
            joining: a member that is new.
            base: of a recovery; else all that came before has succeeded.
        """
        base = base or (self.term, self.sequence - 1)
        data, sequence, before = self._pack_checkpoint(batches, term)
        sides = [side for side in self.sides if side.in_step or side.read_again()]
        if 2 * len(sides) > len(self.members):
            sides = [side for side in sides if side.superblock.area_length >= len(data)]
            if 2 * len(sides) <= len(self.members):
                raise NoSpaceError("the checkpoint does not fit into the ledger")
        for side in self.sides:
            side.in_step = side in sides
        self.write(sides, [side.offset_in(side.inactive, 0) for side in sides], data)
        sides = self.make_durable(sides, "checkpoint")
        self._need_most(sides)
        wanted = {
            side.index: replace(
                side.superblock,
                members=self.members,
                index=side.index,
                promised=max(side.superblock.promised, term),
                term=term,
                first=self.sequence,
                area=side.inactive,
                base=base,
            )
            for side in sides
        }
        if joining is not None:
            # It must know that it is a member before another one says so: else the others could
            # miss it for a majority, and it would have nothing to recover from.
            first = {joining.index: wanted.pop(joining.index)} if joining.index in wanted else {}
            if not self._write_superblocks(first, "joining"):
                raise PoisonedError(f"the new member could not be written: {joining.error}")
        done = self._write_superblocks(wanted, "superblock")
        self._need_most(done if joining is None else [*done, joining])
        self.term, self.tail = term, len(data)
        self.sequence, self._before = sequence, before

    def try_member(self, side: Side, batches: list[list[Record]]) -> None:
        """Writes a checkpoint to a member that joins, before anything of the others is touched.

        Raises:
            VhdxError: it cannot be written.
        """
        data, _, _ = self._pack_checkpoint(batches, self.term)
        member = side.member
        for block in range(2):  # a superblock of another ledger must not be taken for a newer one
            member.device.write(bytes(BLOCK), member.offset + block * BLOCK)
        member.device.write(data, side.offset_in(side.inactive, 0))
        member.device.flush()

    def change_members(
        self,
        members: tuple[UUID, ...],
        changed: list[Side],
        batches: list[list[Record]],
        joining: Side | None = None,
    ) -> None:
        """Writes a checkpoint that has other members than before: one more, or one less.

        Args:
            members: names of all.
            changed: those that are there.
            batches: the records.
            joining: the one of them that is new.
        """
        before = self.sides, self.members
        self.sides = [side.moved_to(members) for side in changed]
        self.members = members
        joining = next((s for s in self.sides if joining and s.name == joining.name), None)
        try:
            self.write_checkpoint(batches, self.term, joining)
        except NoSpaceError:
            if not self.touched:
                self.sides, self.members = before
            raise

    def leave_out(self, name: UUID) -> bool:
        """Writes no more to this member; False if the others are not more than half."""
        others = [side for side in self.in_step() if side.name != name]
        if 2 * len(others) <= len(self.members):
            return False
        for side in self.sides:
            if side.name == name:
                side.in_step, side.left_out = False, True
        return True

    def add_member(self, member: Member, batches: list[list[Record]]) -> None:
        """Adds a member; see :meth:`vhdx.ledger.Ledger.add`."""
        name = member.name
        if name is None or name in self.members or len(self.members) == MOST_MEMBERS:
            raise InvalidArgumentError("the new member needs a name of its own, and room")
        self._check_new_region(member, batches)
        names = (*self.members, name)
        joining = blank(self.sides[0].superblock, names, member, 0)
        self.try_member(joining, batches)
        self.change_members(names, [*self.sides, joining], batches, joining)

    def rejoin_member(self, member: Member, batches: list[list[Record]]) -> None:
        """Takes a member back; see :meth:`vhdx.ledger.Ledger.rejoin`."""
        if member.name not in self.members:
            raise InvalidArgumentError("it is not a member")
        self._check_new_region(member, batches)
        known = read_superblock(member)
        if (
            known is not None
            and known.ledger == self.identity
            and known.index < len(known.members)
            and known.members[known.index] == member.name
        ):
            # It keeps what it has until the new superblock is durable.
            index = self.members.index(member.name)
            side = Side(member, member.name, index, known)
        else:
            side = blank(self.sides[0].superblock, self.members, member, 0)
            self.try_member(side, batches)
        self.sides = [each for each in self.sides if each.name != side.name] + [side]
        self.write_checkpoint(batches, self.term)

    def remove_member(self, name: UUID, batches: list[list[Record]]) -> None:
        """Removes a member; see :meth:`vhdx.ledger.Ledger.remove`."""
        if name not in self.members or len(self.members) == 1:
            raise InvalidArgumentError("it is not a member, or it is the last one")
        names = tuple(each for each in self.members if each != name)
        self.change_members(names, [s for s in self.sides if s.name != name], batches)

    def _check_new_region(self, member: Member, batches: list[list[Record]]) -> None:
        check_region(member)
        others = (side.member for side in self.sides if side.name != member.name)
        if any(overlap(other, member) for other in others):
            raise InvalidArgumentError("the region is that of a member", path=member.device.path)
        if self.packed_length(batches) > area_length(member.length):
            raise NoSpaceError("the records do not fit there", path=member.device.path)

    def promise(self, term: int, voters: list[Side]) -> None:
        """Claims a term on more than half; only those count that have the ledger."""
        promises = {side.index: replace(side.superblock, promised=term) for side in voters}
        self._need_most(self._write_superblocks(promises, "promise"))

    def _write_superblocks(self, wanted: dict[int, Superblock], what: str) -> list[Side]:
        """Writes each over the older one of its member; returns those where it is durable."""
        sides = [side for side in self.sides if side.index in wanted]
        for side in sides:
            new = wanted[side.index]
            new = wanted[side.index] = replace(new, number=new.number + 1)
            self.write([side], [side.member.offset + new.number % 2 * BLOCK], new.pack())
        sides = self.make_durable(sides, what)
        for side in sides:  # what one that failed holds is read again before it is used
            side.superblock = wanted[side.index]
        return sides
