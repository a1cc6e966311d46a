# SPDX-License-Identifier: MIT
"""Disks that return: what of their content still counts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vhdx.arrays import np
from vhdx.spaces.state import IN_STEP, STALE
from vhdx.spaces.states import DiskStatus

if TYPE_CHECKING:
    from vhdx.ledger import Record
    from vhdx.spaces.core import Core
    from vhdx.spaces.disks import PhysicalDisk

__all__ = ["take_back"]


def take_back(
    core: Core, index: int, physical: PhysicalDisk, position: tuple[int, int] | None, *, rejoins: bool
) -> bool:
    """Lets a disk that is out take part again; under the pool's lock.

    If its file was not touched while it was away, only rows that have a mark can differ. Else every
    slab is compared with another copy before it is read. An old copy of the disk never stands in for
    content that nothing else has.

    Args:
        core: of the pool.
        index: of the disk.
        physical: its open file.
        position: term and sequence of the last commit that it has; None if it has no ledger.
        rejoins: the ledger does not write to it yet.

    Returns:
        Whether it takes part now. If not, it is an old copy that has the only copy of something.
    """
    state = core.state
    disk = state.disks[index]
    out = disk.out
    if out is None:
        return True
    is_old = out.all_stale or position is None or position < (out.term, out.sequence)
    is_untouched = not is_old and out.modified is not None and physical.found_modified == out.modified
    was_open = core.disks.get(index)
    core.disks[index] = physical
    try:
        return _take_back(core, index, physical, is_old, is_untouched, rejoins=rejoins)
    except BaseException:
        if was_open is None:
            core.disks.pop(index, None)
        raise


def _take_back(
    core: Core,
    index: int,
    physical: PhysicalDisk,
    is_old: bool,
    is_untouched: bool,
    *,
    rejoins: bool,
) -> bool:
    state = core.state
    disk = state.disks[index]
    records: list[Record] = []
    stale = 0
    for space in state.spaces.values():
        rows = space.rows
        mine = (rows["disk"] == index) & (rows["state"] == IN_STEP)
        if not mine.any():
            continue
        found = core.entries(space, 0, len(rows))
        only = found.readable & mine & (found.readable.sum(axis=2, keepdims=True) == 1)
        if is_old and only.any():
            del core.disks[index]
            return False
        differs = mine & ~only
        if is_untouched:
            differs &= space.marked(0, len(rows))[:, None, None]
        changed = rows.copy()
        changed["state"][differs] = STALE
        for row in np.flatnonzero(differs.any(axis=(1, 2))).tolist():
            records += list(state.rows_records(space, row, changed[row : row + 1]))
        stale += int(differs.sum())
    back = replace(disk, out=None, path=physical.path)
    text = f"it takes part again; {stale} slabs are compared with another copy first"
    records += [state.disk_record(back), core.event("disk-back", text, disk.name)]
    if rejoins:
        core.change_members(lambda parts: core.ledger.rejoin(physical.member, parts), records)
    else:
        core.commit(records)
    core.refresh_all()
    core.changed.set()
    return True


def status_of(text: str) -> DiskStatus:
    """The status of a disk that could not be opened, by the message why."""
    if "label" in text or "short" in text:
        return DiskStatus.UNRECOGNIZED_METADATA
    return DiskStatus.LOST_COMMUNICATION
