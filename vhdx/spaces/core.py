# SPDX-License-Identifier: MIT
"""The heart of an open pool: its state, its ledger, its disks, and the layouts that use them.

Every change goes the same way: records are added to the ledger and applied to the state, the commit
makes them durable, and only then C learns of it. So what C does after a change is never ahead of
what a crash would leave. One lock, which is reentrant, covers a change from its first look at the
state to C. C is never in a request while it waits for this lock with a range or an epoch held.

A disk that fails is taken out: the record of that is durable before any request is answered that the
disk missed. Rows that only it has stay on it as long as its file is there.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import (
    ClosedError,
    NoSpaceError,
    PoisonedError,
    ReadOnlyError,
    VhdxError,
)
from vhdx.ledger import Ledger, Record
from vhdx.ledger.layout import area_length, check_record
from vhdx.spaces.disks import PhysicalDisk
from vhdx.spaces.placement import DiskViews, Entries, Slabs, entries_of
from vhdx.spaces.state import (
    DiskState,
    Event,
    Out,
    PoolState,
    SpaceState,
)
from vhdx.spaces.states import DiskStatus

if TYPE_CHECKING:
    import numpy.typing as npt


__all__ = ["Attached", "Core"]

_GROUP_OVERHEAD = 4096 + 64  # bytes in the ledger, beside the records
_RECORD_OVERHEAD = 16
_NOTES_SECONDS = 10.0


class Attached(Protocol):
    """A space that is attached (:class:`vhdx.spaces.space.Space`)."""

    layout: plane.Layout
    unreconciled: npt.NDArray[np.bool_]
    filling: dict[tuple[int, int, int], tuple[int, int]]

    @property
    def state(self) -> SpaceState:
        """What the ledger says of it."""

    def refresh(self, first: int, count: int) -> set[int]:
        """Tells C about rows; returns disks that are out and have the last copy of some."""

    def forget_disk(self, index: int) -> None:
        """The disk is closed next."""

    def grow(self) -> None:
        """Takes over a larger size."""


class Core:
    """What the parts of an open pool share.

    Attributes:
        lock: covers every change.
        state: what the ledger says.
        disks: the open ones, by index.
        slabs: which are free.
        spaces: the attached ones, by number.
        read_only: nothing may be changed.
        broken: why nothing works any more, or None.
        changed: set when there may be work for repairs.
    """

    def __init__(
        self,
        state: PoolState,
        ledger: Ledger | None,
        disks: dict[int, PhysicalDisk],
    ) -> None:
        self.lock = threading.RLock()
        self.state, self.disks = state, disks
        self.slabs = Slabs(state)
        self.spaces: dict[int, Attached] = {}
        self.read_only = ledger is None
        self.broken: VhdxError | None = None
        self.changed = threading.Event()
        self.listeners: list[Callable[[Event], None]] = []
        self.pool = plane.shared_pool(plane.Level.SPACE)
        self.departures: dict[int, int] = {}  # how often a disk was taken out since the opening
        self.removals: set[int] = set()  # disks that are being removed
        self._noted: dict[int, float] = {}  # when a failure of a disk was recorded last
        self._ledger = ledger
        self._acknowledged = (0, 0) if ledger is None else ledger.position

    @property
    def ledger(self) -> Ledger:
        """The ledger; only where the pool is not read-only."""
        assert self._ledger is not None
        return self._ledger

    def check(self) -> None:
        """Raises why the pool cannot be changed, if it cannot."""
        if self.broken is not None:
            raise type(self.broken)(
                self.broken.message, reason=self.broken.reason, hint=self.broken.hint
            )
        if self.read_only:
            raise ReadOnlyError("the pool is open for reading only", path=self.state.settings.name)

    # ---- durable changes; under the lock ----

    def need_room(self, size: int = 0) -> None:
        """Raises NoSpaceError unless so many bytes of records leave a part of the ledger free.

        That part is kept for what must always be possible: to record that a disk failed, to delete
        something, to open the pool.
        """
        size += _GROUP_OVERHEAD
        capacity = min((area_length(d.label.region_length) for d in self.disks.values()), default=0)
        kept = max(capacity // 8, min(64 << 10, capacity // 4))
        try:
            if size + kept > self.ledger.room:
                self.ledger.checkpoint(self.state.records())
        except NoSpaceError:
            raise
        except VhdxError as error:
            self.break_down(error)
            raise
        if size + kept > self.ledger.room:
            raise self._full()

    def _full(self) -> NoSpaceError:
        return NoSpaceError(
            "the metadata of the pool fills its place on the disks",
            path=self.state.settings.name,
            hint="delete spaces or files; larger disks have more room",
        )

    def commit(self, records: Iterable[Record], *, grows: bool = False) -> None:
        """Makes records durable, and applies them to the state.

        Args:
            records: in order.
            grows: what they add is refused while little room is left (:meth:`need_room`).

        Raises:
            NoSpaceError: the ledger is full; nothing was changed.
            PoisonedError: too few disks could be written. The pool is broken then.
        """
        self.check()
        wanted = list(records)
        size = sum(len(r.payload) + _RECORD_OVERHEAD for r in wanted)
        size += _GROUP_OVERHEAD * (1 + size // (1 << 20))
        if grows:
            self.need_room(size)
        try:
            if size > self.ledger.room:
                self.ledger.checkpoint(self.state.records())
            if size > self.ledger.room:
                raise self._full()
            for record in wanted:
                check_record(record)
            for record in wanted:
                self.ledger.append(*record)
                self.state.apply(*record)
            before = self._acknowledged
            self.ledger.commit()
        except NoSpaceError:
            raise
        except VhdxError as error:
            self.break_down(error)
            raise
        self._acknowledged = self.ledger.position
        self._notice_failed_members(before)

    def change_members(
        self, change: Callable[[Sequence[Record]], None], records: Iterable[Record]
    ) -> None:
        """As :meth:`commit`, with a checkpoint that changes the members of the ledger.

        Args:
            change: a method of the ledger; gets the records of the whole state.
            records: applied to the state.

        Raises:
            VhdxError: the change is not possible; nothing was changed, unless the pool is broken now.
        """
        self.check()
        added = list(records)
        try:
            change([*self.state.records(), *added])
        except VhdxError as error:
            if self.ledger.is_ended:
                self.break_down(error)
            raise
        for record in added:
            self.state.apply(*record)
        before, self._acknowledged = self._acknowledged, self.ledger.position
        self._notice_failed_members(before)

    def event(self, kind: str, text: str, subject: str = "") -> Record:
        """The record of an event, which the caller commits."""
        number = self.state.event_number + 1
        event = Event(number, int(time.time() * 1000), kind, text, subject)
        for listener in self.listeners:
            with contextlib.suppress(Exception):
                listener(event)
        return self.state.event_record(event)

    def break_down(self, error: VhdxError) -> None:
        """Nothing can be made durable any more: every request fails from now on."""
        if self.broken is None:
            self.broken = PoisonedError(
                f"the pool stopped: {error}",
                path=self.state.settings.name,
                hint="open it again when more than half of its disks are there",
            )
            for space in self.spaces.values():
                space.layout.poison()
        self.changed.set()

    def _notice_failed_members(self, before: tuple[int, int]) -> None:
        """A disk that the ledger could not write to is out, before anybody relies on it."""
        names = [self.ledger.members[index] for index in self.ledger.out_of_step]
        for index, disk in list(self.state.disks.items()):
            if disk.id in names and disk.out is None and index in self.disks:
                self.take_out(
                    index, DiskStatus.IO_ERROR, "its metadata could not be written", position=before
                )

    # ---- disks that fail; under the lock ----

    def take_out(
        self,
        index: int,
        status: DiskStatus,
        text: str,
        *,
        position: tuple[int, int] | None = None,
        all_stale: bool = False,
    ) -> None:
        """Records that a disk takes no part from now on, and goes on without it."""
        disk = self.state.disks[index]
        if disk.out is not None:
            return
        self.departures[index] = self.departures.get(index, 0) + 1
        for space in self.spaces.values():  # slabs that are filled there are given up
            for key in [key for key, (where, _) in space.filling.items() if where == index]:
                self.slabs.release(*space.filling.pop(key))
        term, sequence = position or self._acknowledged
        out = Out(
            since=self.state.event_number + 1,
            status=status,
            text=text,
            term=term,
            sequence=sequence,
            all_stale=all_stale,
            time=int(time.time() * 1000),
        )
        self.commit(
            [
                self.state.disk_record(replace(disk, out=out)),
                self.event("disk-out", f"{status.text}: {text}", disk.name),
            ]
        )
        needed = self.refresh_all()
        if index not in needed:
            self._let_go(index)
        self.changed.set()

    def _let_go(self, index: int) -> None:
        """Closes a disk that is out and has no last copies; notes when it was changed last."""
        physical = self.disks.pop(index, None)
        if physical is None:
            return
        for space in self.spaces.values():
            space.forget_disk(index)
        disk = self.state.disks[index]
        try:
            if self.ledger.leave_out(disk.id) and disk.out is not None:
                out = replace(disk.out, modified=physical.modified())
                with contextlib.suppress(NoSpaceError):
                    self.commit([self.state.disk_record(replace(disk, out=out))])
        finally:
            physical.close()

    def note_trouble(self, error: Exception) -> None:
        """Records that something in the background went wrong in a way that nobody expected."""
        with self.lock, contextlib.suppress(VhdxError):
            self.commit([self.event("trouble", f"{type(error).__name__}: {error}")])

    def note_failure(self, index: int, operation: plane.Operation, error: VhdxError) -> None:
        """Records that a disk failed a request that nothing else could answer; not too often."""
        now = time.monotonic()
        if now - self._noted.get(index, -_NOTES_SECONDS) < _NOTES_SECONDS:
            return
        self._noted[index] = now
        name = self.state.disks[index].name
        with contextlib.suppress(VhdxError):
            text = f"{operation.name.lower()}: {error.message}; there is no other copy"
            self.commit([self.event("disk-error", text, name)])

    def blame(self, space: Attached, row: int, members: Iterable[int], error: VhdxError) -> bool:
        """Takes out the disk that a failed copy or comparison names; returns whether it did.

        Args:
            space: of the copy.
            row: of the copy.
            members: numbers of those that took part, in the row.
            error: why it failed; its path is the disk's.
        """
        if isinstance(error, (NoSpaceError, ClosedError)):
            return False
        with self.lock, contextlib.suppress(VhdxError):
            entries = space.layout.read_entries(row, 1)[0]
            for member in members:
                index = plane.disk_of_entry(int(entries[member]))
                physical = self.disks.get(index)
                if physical is not None and physical.path == error.path:
                    self.take_out(index, DiskStatus.IO_ERROR, error.message)
                    return True
        return False

    def give_back_space(self, index: int, slab: int) -> None:
        """Lets the host have the space of a slab that is free."""
        with contextlib.suppress(VhdxError):
            self.disks[index].device.trim(self.place_of(index, slab), self.state.settings.slab)

    # ---- rows; under the lock ----

    def views(self) -> DiskViews:
        return DiskViews.of(self.state, self.disks)

    def entries(self, space: SpaceState, first: int, count: int) -> Entries:
        """What C may do with rows."""
        attached = self.spaces.get(space.number)
        unreconciled = np.zeros(count, np.bool_)
        if attached is not None:
            unreconciled = attached.unreconciled[first : first + count]
        slab = self.state.settings.slab
        rows, marked = space.rows[first : first + count], space.marked(first, count)
        return entries_of(rows, marked, unreconciled, self.views(), slab)

    def refresh_all(self) -> set[int]:
        """Tells C about all rows; returns the disks that are out and have the last copy of some."""
        needed: set[int] = set()
        for space in list(self.spaces.values()):
            needed |= space.refresh(0, len(space.state.rows))
        return needed

    def place_of(self, index: int, slab: int) -> int:
        """The offset of a slab on its disk, in bytes."""
        return self.state.disks[index].slabs_offset + slab * self.state.settings.slab

    def usable(self, index: int) -> DiskState | None:
        """The disk, if it is open and takes part."""
        disk = self.state.disks.get(index)
        return disk if disk is not None and disk.out is None and index in self.disks else None
