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

Members change one at a time: a checkpoint names the new list, and more than half of the new list must
have it. Any majority of a list has a member in common with any majority of the list that has one
more or one less, so a recovery that has most of the old list meets a member that has the new one,
or that promised another term (D. Ongaro, "Consensus: Bridging Theory and Practice", 2014, section
4.1). The list of the member with the highest (term, sequence) counts.

Failures. What went wrong before the first write changes nothing, and can be tried again. After any
other failure this object refuses everything, because it does not know what is on the members. A
recovery finds out.

Checkpoints. The records of an area can be replaced by others that stand for the same state. They go
to the area that is not in use; when they are durable, a superblock makes that area the current one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from vhdx import plane
from vhdx.errors import (
    ClosedError,
    InvalidArgumentError,
    PoisonedError,
    Reason,
    VhdxError,
)
from vhdx.interrupts import uninterruptible
from vhdx.ledger.founding import Amend, found, recover
from vhdx.ledger.layout import (
    Member,
    Record,
    check_record,
)
from vhdx.ledger.members import look
from vhdx.ledger.writing import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["Ledger", "Recovered"]


class Recovered(NamedTuple):
    """What a recovery found.

    Attributes:
        ledger: ready for new records.
        records: everything that was committed, in order, since and including the last checkpoint.
        out_of_step: indexes of members that are away, failed, or had missed commits. A member that
            had missed commits and did not fail has everything again.
        missed: names of members that are there, and lack a commit that had succeeded without them:
            they were away, or they are old copies.
        positions: where each member that is there was: term, and sequence of its last group.
        base: the position of a member that missed nothing is this or later.
    """

    ledger: Ledger
    records: list[Record]
    out_of_step: list[int]
    missed: list[UUID]
    positions: dict[UUID, tuple[int, int]]
    base: tuple[int, int]


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
        self._process = os.getpid()

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
        return cls(found(cls.writer_type, members, pool, identity, names))

    @classmethod
    def recover(
        cls,
        members: Sequence[Member],
        pool: plane.Pool,
        *,
        identity: UUID | None = None,
        amend: Amend | None = None,
    ) -> Recovered:
        """Opens a ledger, also after a crash, and writes a checkpoint of what was found.

        Args:
            members: those that are there, in any order.
            pool: as for :meth:`create`.
            identity: the UUID that the ledger must have; any if None.
            amend: what is written is what it returns. Then members that missed commits get nothing
                before they rejoin, if there is a majority without them.

        Raises:
            DamagedError: no member has a ledger, they are of several ledgers, or one is there twice.
            UnsupportedError: a member was written by a newer version.
            HostIOError: reason NO_QUORUM: half of the members or more are away.
            NoSpaceError: half of the members or more are too small for what the others hold.
        """
        start = recover(cls.writer_type, members, pool, identity, amend)
        return Recovered(cls(start.writer), *start[1:])

    @staticmethod
    def read(members: Sequence[Member], *, identity: UUID | None = None) -> list[Record]:
        """What :meth:`recover` would find; changes nothing, and raises what it raises."""
        return look(members, identity)[0]

    # ---- records ----

    @property
    def room(self) -> int:
        """Bytes of commits that fit before the next checkpoint; each takes a multiple of 4096."""
        return self._writer.room

    @property
    def members(self) -> tuple[UUID, ...]:
        """The names of all members."""
        return self._writer.members

    @property
    def out_of_step(self) -> list[int]:
        """Indexes of members that failed, or that were away at the recovery."""
        return self._writer.out_of_step

    @property
    def is_ended(self) -> bool:
        """Whether it failed or was closed: nothing can be written any more."""
        return self._ended is not None

    @property
    def position(self) -> tuple[int, int]:
        """Term, and sequence of the last group that was written."""
        return self._writer.term, self._writer.sequence - 1

    def leave_out(self, name: UUID) -> bool:
        """Writes no more to a member until it rejoins; False if the others are no majority."""
        with self._lock:
            while self._writes:
                self._changed.wait()
            return self._writer.leave_out(name)

    def append(self, kind: int, payload: bytes) -> None:
        """Adds a record; it is durable when a later :meth:`commit` returns.

        After a crash during a commit its first records may be there and the rest missing; none is
        there in part.
        """
        self._check_process()
        if not isinstance(payload, (bytes, bytearray, memoryview)):
            raise InvalidArgumentError("the payload of a record is bytes")
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
        self._check_process()
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
        self._replace_records(
            parts, lambda records: self._writer.write_checkpoint([records], self._writer.term)
        )

    @uninterruptible
    def add(self, member: Member, parts: Iterable[tuple[int, bytes]]) -> None:
        """A checkpoint that has one more member; else as :meth:`checkpoint`.

        Args:
            member: has a name that no member has. What its region held is lost.
            parts: as for :meth:`checkpoint`.

        Raises:
            InvalidArgumentError: it has no name of its own, the region is unfit or a member's, or
                there are too many.
            NoSpaceError: the records do not fit into its region; nothing was changed.
            VhdxError: reason CANCELLED: another checkpoint came first, so these parts are old. Or it
                cannot be written; nothing was changed.
        """
        self._replace_records(
            parts, lambda records: self._writer.add_member(member, [records]), is_change=True
        )

    @uninterruptible
    def rejoin(self, member: Member, parts: Iterable[tuple[int, bytes]]) -> None:
        """A checkpoint that a member which was away gets again; else as :meth:`checkpoint`.

        Args:
            member: has the name of a member. What its region held is lost.
            parts: as for :meth:`checkpoint`.

        Raises:
            InvalidArgumentError: there is no such member, or the region is unfit.
            VhdxError: as for :meth:`add`.
        """
        self._replace_records(
            parts, lambda records: self._writer.rejoin_member(member, [records]), is_change=True
        )

    @uninterruptible
    def remove(self, name: UUID, parts: Iterable[tuple[int, bytes]]) -> None:
        """A checkpoint that has one member less; else as :meth:`checkpoint`.

        Raises:
            InvalidArgumentError: there is no such member, or it is the last.
            VhdxError: reason CANCELLED, as for :meth:`add`.
        """
        self._replace_records(
            parts, lambda records: self._writer.remove_member(name, [records]), is_change=True
        )

    def _replace_records(
        self,
        parts: Iterable[tuple[int, bytes]],
        write: Callable[[list[Record]], None],
        *,
        is_change: bool = False,
    ) -> None:
        """Around a checkpoint, which stands for all that was appended before the call."""
        self._check_process()
        records = [Record(kind, payload) for kind, payload in parts]
        with self._lock:
            upto = self._appended
            self._checkpoints += 1
        try:
            covered = self._begin_checkpoint(upto)
            if covered is not None:
                with self._writing(covered, upto, is_checkpoint=True):
                    write(records)
            elif is_change:
                raise VhdxError(
                    "another checkpoint came first: build the records again", reason=Reason.CANCELLED
                )
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
            return covered

    def close(self) -> None:
        """Ends the ledger; what was appended and not committed is lost. The devices stay open."""
        if os.getpid() != self._process:
            return
        with self._lock:
            while self._writes:
                self._changed.wait()
            self._ended = self._ended or ClosedError("the ledger was closed")
            self._changed.notify_all()

    # ---- writing; one thread at a time ----

    def _check_process(self) -> None:
        if os.getpid() != self._process:  # another thread may have held the lock at the fork
            raise ClosedError("it belongs to the process that opened it", reason=Reason.FORKED)

    def _check_locked(self) -> None:
        if self._ended is not None:
            raise type(self._ended)(self._ended.message, reason=self._ended.reason)

    @contextlib.contextmanager
    def _writing(
        self, records: list[Record], upto: int, *, is_checkpoint: bool = False
    ) -> Iterator[None]:
        """Around the one write that is under way: its ``records`` make the first ``upto`` durable."""
        self._writer.touched = False
        try:
            yield
            with self._lock:
                self._durable = max(self._durable, upto)
                if is_checkpoint:
                    self._checkpointed = upto
        except BaseException as error:
            with self._lock:
                self._pending[:0] = records
                if self._writer.touched:
                    self._ended = PoisonedError(f"a write to the ledger failed: {error}")
            raise
        finally:
            with self._lock:
                self._writes = False
                self._changed.notify_all()
