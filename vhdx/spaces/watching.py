# SPDX-License-Identifier: MIT
"""What a pool does by itself: it looks after its disks, and cleans the marks of idle rows."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from vhdx import place
from vhdx.arrays import np
from vhdx.errors import VhdxError
from vhdx.ledger.members import position_of
from vhdx.spaces.disks import PhysicalDisk, read_label
from vhdx.spaces.opening import attach_detached
from vhdx.spaces.returning import take_back
from vhdx.spaces.state import STALE
from vhdx.spaces.states import DiskStatus, RetirePolicy, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from vhdx.spaces.core import Attached, Core
    from vhdx.spaces.repairing import Repairer

__all__ = ["Watcher", "clean_marks"]

_TICK = 0.5  # seconds
_IDLE = 30.0  # seconds without a change after which a row's mark goes away
_AFTER_ERROR = 30.0  # seconds after which a disk that failed a request is tried again
_SLOW_NS = 2_000_000_000  # a request that takes so long makes a disk's latency abnormal


class Watcher:
    """Looks after an open pool.

    Args:
        core: of the pool.
        repairer: is told when something changed.
        detached: for each space that is detached why, by number; those that can be attached are.
    """

    def __init__(self, core: Core, repairer: Repairer, detached: dict[int, str]) -> None:
        self._core, self._repairer, self._detached = core, repairer, detached
        self._stop = threading.Event()
        self._changed: dict[tuple[int, int], float] = {}  # by space and row: when, monotonic
        self._slow: dict[int, float] = {}
        self._tries: dict[int, tuple[float, float]] = {}  # of disks that are out: next, and pause
        self._alerted: set[int] = set()
        self._thread = threading.Thread(target=self._work, name="vhdx-watch", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def is_slow(self, index: int) -> bool:
        """Whether the disk answered slowly in the last minute."""
        return time.monotonic() - self._slow.get(index, -60.0) < 60.0

    def _work(self) -> None:
        ticks = 0
        while not self._stop.wait(_TICK):
            ticks += 1
            try:
                self.look(ticks)
            except Exception as error:  # the pool must be looked after as long as it is open
                self._core.note_trouble(error)

    def look(self, ticks: int = 0) -> None:
        """One round."""
        core = self._core
        if core.broken is not None:
            return
        with core.lock:
            for index in list(core.disks):
                self._try(self._check_file, index)
            out = [index for index, disk in core.state.disks.items() if disk.out is not None]
        for index in out:
            self._try(self._look_for, index)
        with core.lock:
            for step in (self._retire, self._alert, self._measure):
                self._try(step)
        if ticks % 10 == 0:
            self._try(self._clean_idle)
            with core.lock:
                self._repairer.try_again()

    def _try(self, step: Callable[..., None], *what: Any) -> None:
        """One that cannot be done now must not keep the others from being done."""
        with contextlib.suppress(VhdxError):
            step(*what)

    # ---- disks; under the lock, but for _look_for ----

    def _check_file(self, index: int) -> None:
        core = self._core
        if index not in core.disks:
            return
        disk = core.state.disks[index]
        if disk.out is None and not core.disks[index].is_where_it_was():
            core.take_out(index, DiskStatus.LOST_COMMUNICATION, "its file is gone, or was cut off")

    def _look_for(self, index: int) -> None:
        """Takes a disk back whose file is there again; opens the file without the lock."""
        core = self._core
        with core.lock:
            disk = core.state.disks.get(index)
            if disk is None or disk.out is None:
                return
            held = core.disks.get(index)
            if held is not None:  # it has the last copy of something, so it was not closed
                is_lost = disk.out.status is DiskStatus.LOST_COMMUNICATION
                if is_lost and held.is_where_it_was():
                    self._take_back(index, held, core.ledger.position, rejoins=False)
                return
        now = time.monotonic()
        first = _AFTER_ERROR if disk.out.status is DiskStatus.IO_ERROR else 0.0
        when, pause = self._tries.get(index, (now + first, 1.0))
        if now < when or place.key_of(disk.path) is None:
            self._tries[index] = (when, pause)
            return
        self._tries[index] = (now + pause, min(2 * pause, 60.0))  # unless it comes back
        file = place.open_file(disk.path, write=True)
        try:
            label = read_label(file)
            if label.disk != disk.id or label.has_left:
                raise VhdxError("another disk is there", path=disk.path)
            physical = PhysicalDisk(file, label, disk.latency)
            position = position_of(physical.member)
            with core.lock:
                is_wanted = core.state.disks.get(index) == disk and index not in core.disks
                if is_wanted and self._take_back(index, physical, position, rejoins=True):
                    del self._tries[index]
                    return
        except BaseException:
            file.close()
            raise
        file.close()

    def _take_back(
        self,
        index: int,
        physical: PhysicalDisk,
        position: tuple[int, int] | None,
        *,
        rejoins: bool,
    ) -> bool:
        if not take_back(self._core, index, physical, position, rejoins=rejoins):
            return False
        attach_detached(self._core, self._detached)
        self._repairer.try_again()
        return True

    def _retire(self) -> None:
        core = self._core
        settings = core.state.settings
        has_spare = any(
            disk.usage is Usage.HOT_SPARE and core.usable(disk.index)
            for disk in core.state.disks.values()
        )
        if settings.retire is RetirePolicy.NEVER or (
            settings.retire is RetirePolicy.AUTO and not has_spare
        ):
            return
        now = int(time.time() * 1000)
        for disk in list(core.state.disks.values()):
            out = disk.out
            if out is None or out.retired or now - out.time < settings.retire_seconds * 1000:
                continue
            retired = replace(disk, out=replace(out, retired=True))
            text = f"it was away for {settings.retire_seconds:g} s: its slabs are rebuilt elsewhere"
            core.commit(
                [core.state.disk_record(retired), core.event("disk-retired", text, disk.name)]
            )
            self._repairer.try_again()

    def _alert(self) -> None:
        """An event for each threshold that the allocated part of the pool has crossed."""
        core = self._core
        total = sum(disk.slabs for disk in core.state.disks.values())
        used = sum(core.slabs.used(index) for index in core.state.disks)
        for percent in core.state.settings.alert_percents:
            is_above = total > 0 and used * 100 >= percent * total
            if is_above and percent not in self._alerted:
                text = f"{used} of {total} slabs are in use: more than {percent} %"
                core.commit([core.event("capacity", text)])
                self._alerted.add(percent)
            elif not is_above:
                self._alerted.discard(percent)

    def _measure(self) -> None:
        core = self._core
        for index in list(core.disks):
            slowest = 0
            for space in core.spaces.values():
                slowest = max(slowest, space.layout.facts(index).slowest_ns)
                space.layout.forget_slowest(index)
            if slowest < _SLOW_NS:
                continue
            if not self.is_slow(index):
                text = f"a request took {slowest / 1e9:.1f} s"
                core.commit([core.event("disk-slow", text, core.state.disks[index].name)])
            self._slow[index] = time.monotonic()

    # ---- marks ----

    def _clean_idle(self) -> None:
        core, now = self._core, time.monotonic()
        with core.lock:
            for number, space in list(core.spaces.items()):
                changed = space.layout.take_changed(0, len(space.state.rows))
                for row in np.flatnonzero(changed).tolist():
                    self._changed[number, row] = now
                idle = [
                    row
                    for row in list(space.state.marks)
                    if now - self._changed.setdefault((number, row), now) >= _IDLE
                ]
                if idle:
                    clean_marks(core, space, idle)
                    for row in idle:
                        self._changed.pop((number, row), None)


def clean_marks(
    core: Core, space: Attached, rows: Iterable[int], *, is_closing: bool = False
) -> None:
    """Takes marks away from rows whose copies are all there, in step, and durable.

    A change that failed on a disk may wait for the pool's lock, so a row that was changed keeps its
    mark, unless nobody uses the space any more.

    Raises:
        VhdxError: that could not be made so; the marks stay.
    """
    with core.lock:
        state = space.state
        if core.broken is not None:
            return
        cleaned = []
        for row in rows:
            members = state.rows[row]
            disks = [core.usable(int(i)) for i in members["disk"][members["state"] != 0]]
            if (
                row in state.marks
                and not space.unreconciled[row]
                and not (members["state"] == STALE).any()
                and all(disk is not None for disk in disks)
            ):
                cleaned.append(row)
        if not cleaned:
            return
        for row in cleaned:
            space.layout.mark(row, 1, marked=False)
        try:
            space.layout.flush()
            busy = [] if is_closing else [r for r in cleaned if space.layout.take_changed(r, 1)[0]]
            still = [r for r in cleaned if r not in busy and _is_whole(core, space, r)]
            core.commit(core.state.marks_records(state, still, marked=False))
        except BaseException:
            still = []
            raise
        finally:
            for row in set(cleaned) - set(still):
                space.layout.mark(row, 1, marked=True)


def _is_whole(core: Core, space: Attached, row: int) -> bool:
    """Whether every member of the row takes part; a flush may have found that one does not."""
    members = space.state.rows[row]
    return all(
        core.usable(int(index)) is not None for index in members["disk"][members["state"] != 0]
    )
