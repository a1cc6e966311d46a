# SPDX-License-Identifier: MIT
"""What is to be repaired, as the state of a pool says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhdx.arrays import np
from vhdx.spaces.state import NONE, STALE, DiskState
from vhdx.spaces.states import Usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vhdx.spaces.core import Core

__all__ = ["Job", "is_wanted", "jobs_of", "leaves_slabs"]


@dataclass(frozen=True)
class Job:
    """One slab to be filled.

    Attributes:
        kind: "resync" (a stale copy), "reconcile" (after a crash), or "rebuild" (onto another disk).
        space: number.
        row, column, slot: the member; of a rebuild the one that is replaced.
    """

    kind: str
    space: int
    row: int
    column: int
    slot: int


def leaves_slabs(disk: DiskState) -> bool:
    """Whether a repair moves everything off the disk."""
    return disk.removing or disk.usage is Usage.RETIRED or (disk.out is not None and disk.out.retired)


def jobs_of(core: Core) -> Iterator[Job]:
    """Everything that is left to be done; under the core's lock."""
    for number, space in core.state.spaces.items():
        attached = core.spaces.get(number)
        if attached is None:
            continue
        rows = space.rows
        for row in np.flatnonzero(attached.unreconciled).tolist():
            yield Job("reconcile", number, row, 0, 0)
        there = [i for i in core.state.disks if core.usable(i) is not None]
        stale = (rows["state"] == STALE) & np.isin(rows["disk"], there)
        leaving = [i for i, disk in core.state.disks.items() if leaves_slabs(disk)]
        moving = (rows["state"] != NONE) & np.isin(rows["disk"], leaving)
        for row, column, slot in np.argwhere(stale & ~moving).tolist():
            yield Job("resync", number, row, column, slot)
        for row, column, slot in np.argwhere(moving).tolist():
            yield Job("rebuild", number, row, column, slot)


def is_wanted(core: Core, job: Job) -> bool:
    """Whether a job from the queue is still to be done; under the core's lock."""
    space = core.spaces.get(job.space)
    if space is None or job.row >= len(space.state.rows):
        return False
    if job.kind == "reconcile":
        return bool(space.unreconciled[job.row])
    member = space.state.rows[job.row, job.column, job.slot]
    disk = core.state.disks.get(int(member["disk"]))
    if member["state"] == NONE or disk is None:
        return False
    if job.kind == "resync":
        return bool(member["state"] == STALE) and core.usable(disk.index) is not None
    return leaves_slabs(disk)
