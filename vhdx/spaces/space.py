# SPDX-License-Identifier: MIT
"""A space that is attached: the layout that serves it, and its owner's answers to C."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import ClosedError, NoSpaceError, VhdxError
from vhdx.spaces.allocating import allocate, release_members
from vhdx.spaces.state import NONE, new_rows
from vhdx.spaces.states import DiskStatus, Provisioning
from vhdx.units import TIB

if TYPE_CHECKING:
    from vhdx.spaces.core import Core
    from vhdx.spaces.state import SpaceState

__all__ = ["LARGEST_SPACE", "Space"]

LARGEST_SPACE = 256 * TIB
_LARGEST_TABLE = 64 * TIB  # of address space for rows, unless the space is larger


class Space:
    """A space whose device can be read and written; see :class:`vhdx.plane.LayoutHandler`.

    Attributes:
        layout: the device.
        unreconciled: rows whose copies may differ since a crash; only the first is read.
        filling: slabs that will replace members: by row, column and slot the disk and slab.
    """

    def __init__(self, core: Core, state: SpaceState, *, after_crash: bool) -> None:
        self._core, self._number = core, state.number
        self.layout = plane.Layout(
            self,
            columns=state.columns,
            copies=state.copies,
            interleave=state.interleave,
            slab=core.state.settings.slab,
            size=state.size,
            largest_size=max(state.size, _LARGEST_TABLE),
            thin=state.provisioning is Provisioning.THIN,
            delayed=any(disk.latency is not None for disk in core.state.disks.values()),
            pool=core.pool,
            path=f"space://{core.state.settings.name}/{state.name}",
        )
        self.unreconciled = np.zeros(len(state.rows), np.bool_)
        self.filling: dict[tuple[int, int, int], tuple[int, int]] = {}
        self._attached: set[int] = set()
        if after_crash and state.copies > 1:
            self.unreconciled = state.marked(0, len(state.rows))
        if core.read_only:
            self.layout.freeze()
        core.spaces[state.number] = self
        self.refresh(0, len(state.rows))
        for row in sorted(state.marks):
            self.layout.mark(row, 1, marked=True)

    @property
    def state(self) -> SpaceState:
        """What the ledger says of it."""
        found = self._core.state.spaces.get(self._number)
        if found is None:
            raise ClosedError("the space was deleted", path=self.layout.path)
        return found

    def refresh(self, first: int, count: int) -> set[int]:
        """Tells C about rows, and the disks that they are on; under the pool's lock.

        Returns:
            Disks that are out and have the last copy of some row.
        """
        core = self._core
        for index, disk in core.disks.items():
            if index not in self._attached:
                self.layout.set_disk(index, disk.device)
                self._attached.add(index)
        self._attached &= core.disks.keys()
        found = core.entries(self.state, first, count)
        for (row, column, slot), (disk_index, slab) in self.filling.items():
            if first <= row < first + count:
                entry = plane.member_entries(
                    plane.MemberKind.STALE, disk_index, core.place_of(disk_index, slab)
                )
                found.entries[row - first, column * self.state.slots + slot] = entry
        self.layout.set_entries(first, found.entries)
        rows = self.state.rows[first : first + count]
        used = np.unique(rows["disk"][found.readable]).tolist()
        return {i for i in used if core.state.disks[i].out is not None}

    def grow(self) -> None:
        """Takes over a larger size; under the pool's lock."""
        state = self.state
        self.unreconciled = _longer(self.unreconciled, len(state.rows))
        self.refresh(0, len(state.rows))
        self.layout.grow(state.size)

    def forget_disk(self, index: int) -> None:
        """The disk is closed next; waits for its requests. Under the pool's lock."""
        self.layout.clear_disk(index)
        self._attached.discard(index)

    # ---- faults ----

    def prepare_row(self, row: int) -> None:
        core = self._core
        with core.lock:
            core.check()
            state = self.state
            records, members = [], None
            if (state.rows[row]["state"] == NONE).all():
                members = allocate(core, state, [row])
                records += list(core.state.rows_records(state, row, members))
            if state.copies > 1 and row not in state.marks:
                records += core.state.marks_records(state, [row], marked=True)
            try:
                if records:
                    core.commit(records, grows=members is not None)
            except NoSpaceError:
                if members is not None:
                    release_members(core, members)
                raise
            self.unreconciled = _longer(self.unreconciled, len(self.state.rows))
            self.refresh(row, 1)
            self.layout.mark(row, 1, marked=True)

    def disk_failed(
        self, disk: int, row: int | None, operation: plane.Operation, error: VhdxError
    ) -> None:
        core = self._core
        with core.lock:
            core.check()
            if core.usable(disk) is None:
                self.refresh(0, len(self.state.rows))
                if row is None or disk not in self._last_copies(row):
                    return
                raise error
            if isinstance(error, NoSpaceError):
                self._stop_filling(disk, error)
                return
            if row is not None and self._is_last_copy(row, disk):
                core.note_failure(disk, operation, error)
                raise error
            core.take_out(disk, DiskStatus.IO_ERROR, f"{operation.name.lower()}: {error.message}")
            if row is None and disk in core.disks and core.disks[disk].device.state:
                raise error  # it lost a write of rows that only it has

    def change_rows(self, operation: plane.Operation, first: int, count: int) -> None:
        del operation  # both read zeros afterwards
        core = self._core
        with core.lock:
            core.check()
            state = self.state
            count = min(count, len(state.rows) - first)
            stored = (state.rows[first : first + count]["state"] != NONE).any(axis=(1, 2))
            rows = [first + int(i) for i in np.flatnonzero(stored)]
            rows = [row for row in rows if not any(key[0] == row for key in self.filling)]
            if not rows:
                return
            self._free_rows(rows)

    def _free_rows(self, rows: list[int]) -> None:
        core, state = self._core, self.state
        for row in rows:
            self.layout.mark(row, 1, marked=False)  # no more changes
        members = state.rows[rows]
        records = []
        for row in rows:
            records += list(
                core.state.rows_records(state, row, new_rows(1, state.columns, state.slots))
            )
        records += core.state.marks_records(state, rows, marked=False)
        core.commit(records)
        self.unreconciled[rows] = False
        for row in rows:
            self.refresh(row, 1)
        for member in members[members["state"] != NONE]:
            index, slab = int(member["disk"]), int(member["slab"])
            core.slabs.release(index, slab)
            if core.usable(index) is not None:
                core.give_back_space(index, slab)

    # ---- what faults ask ----

    def _last_copies(self, row: int) -> set[int]:
        """Disks that are read for a row although they are out."""
        readable = self._core.entries(self.state, row, 1).readable[0]
        return set(self.state.rows[row]["disk"][readable].tolist())

    def _is_last_copy(self, row: int, disk: int) -> bool:
        """Whether a column of the row has no other copy than that on the disk."""
        readable = self._core.entries(self.state, row, 1).readable[0]
        here = readable & (self.state.rows[row]["disk"] == disk)
        return bool((here.any(axis=1) & (readable.sum(axis=1) == 1)).any())

    def _stop_filling(self, disk: int, error: VhdxError) -> None:
        """A slab that is being filled found no space; it is given up."""
        mine = [key for key, (index, _) in self.filling.items() if index == disk]
        if not mine:
            raise error
        for key in mine:
            self._core.slabs.release(*self.filling.pop(key))
            self.refresh(key[0], 1)


def _longer(flags: np.ndarray, count: int) -> np.ndarray:
    """The flags, with room for so many."""
    if len(flags) >= count:
        return flags
    return np.concatenate([flags, np.zeros(count - len(flags), np.bool_)])
