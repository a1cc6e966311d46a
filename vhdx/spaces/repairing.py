# SPDX-License-Identifier: MIT
"""Repairs: copies that are stale, rows that a crash left unreconciled, disks that are replaced.

A job is one slab. Jobs are found in the state, so they survive a restart: what was not recorded is
found again. Several threads work at once, and requests of clients come first: after a piece during
which clients asked for something, a thread rests as long as the piece took.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from vhdx.arrays import np
from vhdx.errors import ClosedError, NoSpaceError, Reason, VhdxError
from vhdx.spaces.jobs import Job, is_wanted, jobs_of, leaves_slabs
from vhdx.spaces.placement import takes_new_slabs
from vhdx.spaces.state import IN_STEP, NONE, STALE, SpaceState
from vhdx.spaces.states import RetirePolicy, Usage
from vhdx.units import MIB

if TYPE_CHECKING:
    from vhdx.spaces.core import Attached, Core

__all__ = ["Repairer"]

_PIECE = 4 * MIB
_PAUSE = 0.05  # seconds until a thread that found nothing looks again, at least
_THREADS = 2
_MOST_QUEUED = 10_000


class Repairer:
    """Repairs a pool in the background.

    Args:
        core: of the pool.

    Attributes:
        done: slabs that were filled since the pool was opened.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._stop = threading.Event()
        self._under_way: set[Job] = set()  # under the core's lock
        self._queue: deque[Job] = deque()  # under the core's lock
        self._refused: dict[Job, str] = {}  # under the core's lock: why, until something changes
        self._idle = threading.Condition(core.lock)
        self.done = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"vhdx-repair-{i}", daemon=True)
            for i in range(_THREADS)
        ]

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stops after the pieces that are under way."""
        self._stop.set()
        self._core.changed.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until nothing is left that can be repaired; False after ``seconds``.

        What could not be done is not tried again; see :meth:`try_again`.
        """
        end = None if seconds is None else time.monotonic() + seconds
        with self._idle:
            self._core.changed.set()
            while self._core.broken is None and (self._under_way or self._has_jobs()):
                rest = None if end is None else end - time.monotonic()
                if rest is not None and rest <= 0:
                    return False
                self._idle.wait(0.2 if rest is None else min(0.2, rest))
        return True

    def _has_jobs(self) -> bool:
        return any(job not in self._refused for job in jobs_of(self._core))

    def waiting(self) -> list[Job]:
        """Jobs that are left, also those that are under way; under the core's lock."""
        return list(jobs_of(self._core))

    def refused(self) -> dict[Job, str]:
        """Jobs that could not be done, and why; under the core's lock."""
        return dict(self._refused)

    def try_again(self) -> None:
        """Something changed: what could not be done may be possible now. Under the core's lock."""
        self._refused.clear()
        self._queue.clear()
        self._core.changed.set()

    # ---- jobs ----

    def _next(self) -> Job | None:
        """A job that can be begun; under the core's lock."""
        busy = {(job.space, job.row) for job in self._under_way}
        for _ in range(2):
            for _ in range(len(self._queue)):
                job = self._queue.popleft()
                if (job.space, job.row) not in busy:
                    return job
                self._queue.append(job)
            if self._queue:
                return None
            found = (job for job in jobs_of(self._core) if job not in self._refused)
            self._queue.extend(itertools.islice(found, _MOST_QUEUED))
        return None

    def _work(self) -> None:
        core = self._core
        while not self._stop.is_set() and core.broken is None:
            core.changed.clear()
            with core.lock:
                job = self._next()
                while job is not None and not is_wanted(core, job):
                    job = self._next()
                if job is not None:
                    self._under_way.add(job)
            if job is None:
                core.changed.wait(1.0)
                self._stop.wait(_PAUSE)
                continue
            try:
                self._do(job)
                self.done += 1
            except Exception as error:
                with core.lock:
                    self._refused[job] = str(error)
                if not isinstance(error, VhdxError):
                    core.note_trouble(error)
            finally:
                with self._idle:
                    self._under_way.discard(job)
                    self._idle.notify_all()

    def _do(self, job: Job) -> None:
        with self._core.lock:
            space = self._core.spaces[job.space]
        if job.kind == "reconcile":
            self._reconcile(space, job.row)
        elif job.kind == "resync":
            self._resync(space, job)
        else:
            self._rebuild(space, job)

    # ---- the three kinds ----

    def _reconcile(self, space: Attached, row: int) -> None:
        """Makes the copies of a row equal to the one that is read since the crash."""
        core, state = self._core, space.state
        with core.lock:
            readable = core.entries(state, row, 1).readable[0]
            pairs = [
                (column * state.slots + int(np.flatnonzero(readable[column])[0]),
                 column * state.slots + slot)
                for column, slot in np.argwhere(readable).tolist()
            ]  # fmt: skip
        for source, target in pairs:
            if source != target:
                self._copy(space, row, source, target, compares=True)
        space.layout.flush()
        with core.lock:
            space.unreconciled[row] = False
            space.refresh(row, 1)

    def _resync(self, space: Attached, job: Job) -> None:
        core = self._core
        with core.lock:
            source = self._source(space.state, job.row, job.column)
            disk = int(space.state.rows[job.row, job.column, job.slot]["disk"])
            departures = core.departures.get(disk, 0)
        target = job.column * space.state.slots + job.slot
        self._copy(space, job.row, source, target, compares=True)
        space.layout.flush()
        with core.lock:
            state = space.state
            rows = state.rows[job.row : job.row + 1].copy()
            member = rows[0, job.column, job.slot]
            if member["state"] != STALE or core.departures.get(disk, 0) != departures:
                return  # it failed meanwhile, and may have missed changes
            rows["state"][0, job.column, job.slot] = IN_STEP
            core.commit(list(core.state.rows_records(state, job.row, rows)))
            space.refresh(job.row, 1)

    def _rebuild(self, space: Attached, job: Job) -> None:
        core = self._core
        key = (job.row, job.column)
        with core.lock:
            state = space.state
            source = self._source(state, job.row, job.column)
            disk, slab, slot = self._take_target(state, job)
            space.filling[*key, slot] = (disk, slab)
            if state.copies == 1:
                space.layout.set_moving(moving=True)
            space.refresh(job.row, 1)
        moved = False
        try:
            target = job.column * state.slots + slot
            self._copy(space, job.row, source, target, compares=False)
            space.layout.flush()
            with core.lock:
                moved = self._switch(space, job, slot)
        finally:
            with core.lock:
                is_attached = core.spaces.get(job.space) is space
                if not moved and space.filling.pop((*key, slot), None) is not None:
                    core.slabs.release(disk, slab)
                    if is_attached:
                        space.refresh(job.row, 1)
                if is_attached and space.state.copies == 1 and not space.filling:
                    space.layout.set_moving(moving=False)

    def _take_target(self, state: SpaceState, job: Job) -> tuple[int, int, int]:
        """A free slab on a disk that the row is not on, and the slot that it gets."""
        core = self._core
        row = state.rows[job.row]
        here = set(row["disk"][row["state"] != NONE].tolist())
        among = [
            index
            for index, disk in core.state.disks.items()
            if index not in here and core.usable(index) is not None and takes_new_slabs(disk, state)
        ]
        spares = [
            index
            for index, disk in core.state.disks.items()
            if disk.usage is Usage.HOT_SPARE and core.usable(index) is not None and index not in here
            and not disk.removing
        ]  # fmt: skip
        old = core.state.disks[int(row[job.column, job.slot]["disk"])]
        policy = core.state.settings.retire
        if old.out is not None and policy is RetirePolicy.AUTO and not old.removing:
            among = []  # a disk that failed is replaced by a hot spare only
        what = f"a slab of space {state.name!r} that moves off disk {old.name!r}"
        disk = core.slabs.choose(spares if spares and old.out is not None else among, 1, what)[0]
        used = [
            slot
            for (r, c, slot) in core.spaces[state.number].filling
            if (r, c) == (job.row, job.column)
        ]
        free = [
            slot
            for slot in range(state.slots)
            if row[job.column, slot]["state"] == NONE and slot not in used
        ]
        if not free:
            raise NoSpaceError("another slab of the column is being filled")
        return disk, core.slabs.take(disk), free[0]

    def _switch(self, space: Attached, job: Job, slot: int) -> bool:
        """Records that the new slab takes the place of the old one; under the core's lock."""
        core, state = self._core, space.state
        key = (job.row, job.column, slot)
        filled = space.filling.get(key)
        if filled is None or core.usable(filled[0]) is None:
            return False
        rows = state.rows[job.row : job.row + 1].copy()
        old = rows[0, job.column, job.slot].copy()
        rows[0, job.column, slot] = (filled[0], IN_STEP, 0, filled[1])
        rows[0, job.column, job.slot] = (0, NONE, 0, 0)
        del space.filling[key]  # first: if the disk fails in the commit, the slab is the row's
        try:
            core.commit(list(core.state.rows_records(state, job.row, rows)))
        except NoSpaceError:
            space.filling[key] = filled
            raise
        space.refresh(job.row, 1)
        index, slab = int(old["disk"]), int(old["slab"])
        core.slabs.release(index, slab)
        if index in core.disks:
            core.give_back_space(index, slab)
        return True

    def _source(self, state: SpaceState, row: int, column: int) -> int:
        """The member to copy from: one on a disk that is emptied only if there is no other."""
        core = self._core
        slots = np.flatnonzero(core.entries(state, row, 1).readable[0, column]).tolist()
        if not slots:
            raise VhdxError("there is no copy to repair it from", reason=Reason.IO)
        disks = state.rows[row, column]["disk"]
        best = min(slots, key=lambda slot: leaves_slabs(core.state.disks[int(disks[slot])]))
        return int(column * state.slots + best)

    def _copy(self, space: Attached, row: int, source: int, target: int, *, compares: bool) -> None:
        """Copies a slab; a disk that fails is taken out."""
        slab = self._core.state.settings.slab
        for at in range(0, slab, _PIECE):
            if self._stop.is_set():
                raise ClosedError("the pool is being closed")
            began = time.monotonic()
            before = space.layout.changes_and_reads()
            try:
                space.layout.copy(row, source, target, at, min(_PIECE, slab - at), compares=compares)
            except VhdxError as error:
                self._core.blame(space, row, (source, target), error)
                raise
            if space.layout.changes_and_reads() != before:
                time.sleep(min(0.1, time.monotonic() - began))
