# SPDX-License-Identifier: MIT
"""Which slabs are free, which disks get the next row, and which members of rows may be used. No I/O.

Slabs are taken first fit inside a disk, and the disks of a row are those with the most free slabs;
all slabs of a row are on different disks. (What Windows chooses differs between identical runs.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import NoSpaceError
from vhdx.spaces.state import IN_STEP, NONE, STALE, DiskState, PoolState, Rows, SpaceState
from vhdx.spaces.states import MediaType, Usage

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["DiskViews", "Entries", "Slabs", "entries_of", "takes_new_slabs"]


def takes_new_slabs(disk: DiskState, space: SpaceState) -> bool:
    """Whether new rows of a space may lie on the disk."""
    return (
        disk.out is None
        and not disk.removing
        and disk.usage is Usage.AUTO_SELECT
        and space.media in {MediaType.UNSPECIFIED, disk.media}
    )


class Slabs:
    """The slabs of a pool's disks that are in use."""

    def __init__(self, state: PoolState) -> None:
        self._state = state
        self._used = {index: state.used(index) for index in state.disks}
        self._free = {index: int((~used).sum()) for index, used in self._used.items()}

    def add_disk(self, index: int) -> None:
        """A disk without slabs in use joins."""
        self._used[index] = np.zeros(self._state.disks[index].slabs, np.bool_)
        self._free[index] = len(self._used[index])

    def remove_disk(self, index: int) -> None:
        del self._used[index], self._free[index]

    def used(self, index: int) -> int:
        """Slabs of a disk that are in use."""
        return len(self._used[index]) - self._free[index]

    def take(self, index: int) -> int:
        """Takes the first free slab of a disk that has one."""
        slab = int(np.argmin(self._used[index]))
        assert not self._used[index][slab]
        self._used[index][slab] = True
        self._free[index] -= 1
        return slab

    def release(self, index: int, slab: int) -> None:
        if index in self._used and self._used[index][slab]:
            self._used[index][slab] = False
            self._free[index] += 1

    def choose(self, among: Iterable[int], count: int, what: str) -> list[int]:
        """The ``count`` disks among these that have the most free slabs.

        Raises:
            NoSpaceError: fewer of them have a free slab.
        """
        having = [index for index in among if self._free[index] > 0]
        if len(having) < count:
            wanted = "a disk" if count == 1 else f"{count} different disks"
            raise NoSpaceError(
                f"{what} needs a free slab on {wanted}, and {len(having) or 'none'} "
                f"of those that may be used {'have' if len(having) > 1 else 'has'} one",
                hint=f"disks to add at least: {count - len(having)}; or free space in the pool",
            )
        return sorted(having, key=lambda index: (-self._free[index], index))[:count]


class DiskViews(NamedTuple):
    """What decides about members, by index of the disk.

    Attributes:
        present: its file is open.
        out: it takes no part.
        since: when it went out.
        offset: bytes, of slab 0.
    """

    present: npt.NDArray[np.bool_]
    out: npt.NDArray[np.bool_]
    since: npt.NDArray[np.int64]
    offset: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, state: PoolState, present: Iterable[int]) -> DiskViews:
        count = plane.MOST_DISKS
        views = cls(
            np.zeros(count, np.bool_),
            np.zeros(count, np.bool_),
            np.zeros(count, np.int64),
            np.zeros(count, np.uint64),
        )
        views.present[list(present)] = True
        for index, disk in state.disks.items():
            views.out[index] = disk.out is not None
            views.since[index] = 0 if disk.out is None else disk.out.since
            views.offset[index] = disk.slabs_offset
        return views


class Entries(NamedTuple):
    """Entries of rows for C, and what they mean.

    Attributes:
        entries: one line for each row.
        readable: members by row, column and slot that may be read.
        lost: columns of rows that have slabs and no copy that may be read.
    """

    entries: npt.NDArray[np.uint64]
    readable: npt.NDArray[np.bool_]
    lost: npt.NDArray[np.bool_]


def entries_of(
    rows: Rows,
    marked: npt.NDArray[np.bool_],
    unreconciled: npt.NDArray[np.bool_],
    disks: DiskViews,
    slab: int,
) -> Entries:
    """What C may do with the members of rows.

    A member in step on a disk that takes part is used. If a column has none, then members in step on
    disks that are out, but there, are its last copies: those on the disk that went out last, or all
    if the row is not marked. Of rows that a crash left unreconciled only the first copy is read.

    Args:
        rows: by row, column and slot.
        marked: the row's copies may differ from those of disks that are out.
        unreconciled: the row's copies may differ from each other.
        disks: by index.
        slab: bytes.
    """
    disk, state = rows["disk"].astype(np.int64), rows["state"]
    present, out = disks.present[disk], disks.out[disk]
    in_step = state == IN_STEP
    used = in_step & present & ~out
    without = ~used.any(axis=2, keepdims=True)
    since = np.where(in_step & out, disks.since[disk], -1)
    newest = since == since.max(axis=2, keepdims=True)
    last = in_step & present & out & without & (newest | ~marked[:, None, None])
    readable = used | last
    first = readable & (readable.cumsum(axis=2) == 1)
    doubtful = unreconciled[:, None, None] & readable & ~first
    kind = np.full(state.shape, plane.MemberKind.NONE, np.uint64)
    kind[in_step] = plane.MemberKind.AWAY
    kind[state == STALE] = plane.MemberKind.AWAY
    kind[(state == STALE) & present & ~out] = plane.MemberKind.STALE
    kind[readable] = plane.MemberKind.IN_STEP
    kind[doubtful] = plane.MemberKind.STALE
    offset = disks.offset[disk] + rows["slab"].astype(np.uint64) * np.uint64(slab)
    stored = state != NONE
    entries = plane.member_entries(
        kind, np.where(stored, disk, 0), np.where(stored, offset, np.uint64(0))
    )
    lost = stored.any(axis=2) & ~readable.any(axis=2)
    return Entries(entries.reshape(len(rows), -1), readable, lost)
