# SPDX-License-Identifier: MIT
"""A ledger: records, committed to more than half of its members, and read back after a crash.

Members. A commit is one write and one barrier on each member, on all at once. It succeeds when more
than half of all members have it. A member that fails is left out until the next checkpoint. So any
set of more than half of the members includes one that has everything that was committed.

Terms. A recovery takes what the member with the highest (term, sequence) has. That may include a last
commit that never succeeded. The recovery must then win against members that were away, and against a
recovery that was itself interrupted. So it first makes more than half of the members *promise* a new
term, higher than every promise that they had made, and then writes a checkpoint of that term to all
of them. Two recoveries that write a checkpoint never share a term, because each set of more than
half has a member in common with every other (L. Lamport, "Paxos Made Simple", 2001: a term is a
proposal number).

Failures. What went wrong before the first write changes nothing, and can be tried again. After any
other failure this object refuses everything, because it does not know what is on the members. A
recovery finds out.

Checkpoints. The records of an area can be replaced by others that stand for the same state. They go
to the area that is not in use; when they are durable, a superblock makes that area the current one.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID, uuid4

from vhdx import plane
from vhdx.errors import ClosedError, InvalidArgumentError, PoisonedError, VhdxError
from vhdx.interrupts import uninterruptible
from vhdx.ledger.layout import (
    BLOCK,
    MOST_MEMBERS,
    SMALLEST_REGION,
    Member,
    Record,
    Superblock,
    area_length,
    check_record,
)
from vhdx.ledger.members import Side, read_members
from vhdx.ledger.writing import Writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Ledger", "Recovered"]


class Recovered(NamedTuple):
    """What a recovery found.

    Attributes:
        ledger: ready for new records.
        records: everything that was committed, in order, since and including the last checkpoint.
        out_of_step: indexes of members that are away, failed, or had missed commits. A member that
            had missed commits and did not fail has everything again.
    """

    ledger: Ledger
    records: list[Record]
    out_of_step: list[int]


class Ledger:
    """Records on one or several devices; see the module for the rules.

    Every method may be called from any thread. ``append`` is quick; ``commit`` and ``checkpoint``
    wait for the disks. Use :meth:`create` and :meth:`recover`.

    Attributes:
        identity: the ledger's UUID.
    """

    writer_type = Writer

    def __init__(self, writer: Writer) -> None:
        self.identity = writer.identity
        self._writer = writer
        self._lock = threading.Lock()  # the fields below; never held across I/O
        self._changed = threading.Condition(self._lock)
        self._pending: list[Record] = []
        self._appended = self._durable = 0  # records
        self._writes = False  # a commit or checkpoint is under way
        self._checkpoints = 0  # that wait or are under way
        self._checkpointed = 0  # records that the newest checkpoint stands for
        self._ended: VhdxError | None = None

    # ---- the beginning ----

    @classmethod
    def create(
        cls,
        members: Sequence[Member],
        pool: plane.Pool,
        *,
        identity: UUID | None = None,
        names: Sequence[UUID] | None = None,
    ) -> Ledger:
        """Makes a new, empty ledger; what the regions held is lost.

        Args:
            members: 1 to 251 regions on different devices.
            pool: lends threads for I/O to several members at once.
            identity: the ledger's UUID; random if None.
            names: the members' UUIDs; random if None.

        Raises:
            InvalidArgumentError: a region is too small or not aligned, or there are too many, or
                the names do not fit.
            VhdxError: a member cannot be written.
        """
        if not 1 <= len(members) <= MOST_MEMBERS:
            raise InvalidArgumentError(f"a ledger has 1 to {MOST_MEMBERS} members")
        for member in members:
            if member.length < SMALLEST_REGION or member.offset % BLOCK:
                raise InvalidArgumentError(
                    f"the region of a ledger has at least {SMALLEST_REGION} bytes and begins at a "
                    f"multiple of {BLOCK}",
                    path=member.device.path,
                )
        uuids = tuple(names) if names is not None else tuple(uuid4() for _ in members)
        if len(set(uuids)) != len(members):
            raise InvalidArgumentError("each member needs a name of its own")
        ledger_uuid = identity or uuid4()
        sides = [
            Side(
                member,
                Superblock(ledger_uuid, uuids, index, 0, 1, 1, 0, 1, area_length(member.length)),
            )
            for index, member in enumerate(members)
        ]
        writer = cls.writer_type(sides, pool)
        for block in range(2):
            offsets = [side.member.offset + block * BLOCK for side in sides]
            writer.write(sides, offsets, bytes(BLOCK))
        writer.write_checkpoint([[]], 1)
        for side in sides:
            if side.error is not None:
                raise side.error
        return cls(writer)

    @classmethod
    def recover(
        cls, members: Sequence[Member], pool: plane.Pool, *, identity: UUID | None = None
    ) -> Recovered:
        """Opens a ledger, also after a crash, and writes a checkpoint of what was found.

        Args:
            members: those that are there, in any order.
            pool: as for :meth:`create`.
            identity: the UUID that the ledger must have; any if None.

        Raises:
            DamagedError: no member has a ledger, they are of several ledgers, or one is there twice.
            UnsupportedError: a member was written by a newer version.
            HostIOError: reason NO_QUORUM: half of the members or more are away.
            NoSpaceError: half of the members or more are too small for what the others hold.
        """
        found = read_members(members, identity)
        sides = [side for side, _ in found]
        writer = cls.writer_type(sides, pool)
        writer.promise(max(side.superblock.promised for side in sides) + 1)
        in_step = [area for side, area in found if side.in_step]
        best = max(in_step, key=lambda area: area.position)
        behind = {side.superblock.index for side, area in found if area.position != best.position}
        batches = [[record for batch in best.batches() for record in batch]]
        if writer.packed_length(batches) > best.length:
            batches = best.batches()  # as they are, they fit where they were
        writer.sequence = best.position[1] + 1
        writer.write_checkpoint(batches, max(side.superblock.promised for side in sides))
        out = sorted(set(writer.out_of_step) | behind)
        return Recovered(cls(writer), [record for batch in batches for record in batch], out)

    @staticmethod
    def read(members: Sequence[Member], *, identity: UUID | None = None) -> list[Record]:
        """What :meth:`recover` would find; changes nothing, and raises what it raises."""
        best = max(
            (area for _, area in read_members(members, identity)), key=lambda area: area.position
        )
        return [record for batch in best.batches() for record in batch]

    # ---- records ----

    @property
    def room(self) -> int:
        """Bytes of commits that fit before the next checkpoint; each takes a multiple of 4096."""
        return self._writer.room

    @property
    def out_of_step(self) -> list[int]:
        """Indexes of members that failed, or that were away at the recovery."""
        return self._writer.out_of_step

    def append(self, kind: int, payload: bytes) -> None:
        """Adds a record; it is durable when a later :meth:`commit` returns.

        After a crash during a commit its first records may be there and the rest missing; none is
        there in part.
        """
        record = Record(kind, bytes(payload))
        check_record(record)
        with self._lock:
            self._check_locked()
            self._pending.append(record)
            self._appended += 1

    @uninterruptible
    def commit(self) -> None:
        """Makes all records that were appended durable; callers that wait share a commit.

        Raises:
            NoSpaceError: they do not fit; they stay appended. Write a checkpoint.
            PoisonedError: too few members have them. Whether they last is open until a recovery.
        """
        with self._lock:
            wanted = self._appended
            # A checkpoint goes first: its parts do not have what was appended after its call.
            while (
                (self._writes or self._checkpoints) and self._durable < wanted and self._ended is None
            ):
                self._changed.wait()
            if self._durable >= wanted:
                return
            self._check_locked()
            records, upto = self._pending, self._appended
            self._pending, self._writes = [], True
        with self._writing(records, upto):
            self._writer.write_commit(records)

    @uninterruptible
    def checkpoint(self, parts: Iterable[tuple[int, bytes]]) -> None:
        """Replaces all records by ``parts``, which stand for all records appended before the call.

        The caller lets nobody append between the building of the parts and the call.

        Raises:
            NoSpaceError: they do not fit; nothing was changed.
            PoisonedError: as for :meth:`commit`.
        """
        records = [Record(kind, payload) for kind, payload in parts]
        with self._lock:
            upto = self._appended
            self._checkpoints += 1
        try:
            covered = self._begin_checkpoint(upto)
            if covered is not None:
                with self._writing(covered, upto):
                    self._writer.write_checkpoint([records], self._writer.term)
        finally:
            with self._lock:
                self._checkpoints -= 1
                self._changed.notify_all()

    def _begin_checkpoint(self, upto: int) -> list[Record] | None:
        """The pending records among the first ``upto``; None if a newer checkpoint was written."""
        with self._lock:
            while self._writes and self._ended is None:
                self._changed.wait()
            self._check_locked()
            if upto < self._checkpointed:
                return None
            later = self._appended - upto  # all of them are pending: no commit began meanwhile
            covered = self._pending[: len(self._pending) - later]
            self._pending, self._writes = self._pending[len(covered) :], True
            self._checkpointed = upto
            return covered

    def close(self) -> None:
        """Ends the ledger; what was appended and not committed is lost. The devices stay open."""
        with self._lock:
            while self._writes:
                self._changed.wait()
            self._ended = self._ended or ClosedError("the ledger was closed")
            self._changed.notify_all()

    # ---- writing; one thread at a time ----

    def _check_locked(self) -> None:
        if self._ended is not None:
            raise type(self._ended)(self._ended.message, reason=self._ended.reason)

    @contextlib.contextmanager
    def _writing(self, records: list[Record], upto: int) -> Iterator[None]:
        """Around the one write that is under way: its ``records`` make the first ``upto`` durable."""
        self._writer.touched = False
        try:
            yield
            with self._lock:
                self._durable = max(self._durable, upto)
        except BaseException as error:
            with self._lock:
                self._pending[:0] = records
                if self._writer.touched:
                    self._ended = (
                        error
                        if isinstance(error, PoisonedError)
                        else PoisonedError(f"a write to the ledger failed: {error!r}")
                    )
            raise
        finally:
            with self._lock:
                self._writes = False
                self._changed.notify_all()
