# SPDX-License-Identifier: MIT
"""Slabs for rows that have none. Everything is called under the lock of the core."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vhdx.arrays import np
from vhdx.errors import ClosedError, NoSpaceError, VhdxError
from vhdx.spaces.placement import takes_new_slabs
from vhdx.spaces.state import IN_STEP, NONE, Rows, SpaceState, new_rows
from vhdx.spaces.states import DiskStatus

if TYPE_CHECKING:
    import numpy.typing as npt

    from vhdx.spaces.core import Core

__all__ = ["allocate", "release_members", "zero_slabs"]


def allocate(core: Core, space: SpaceState, rows: Sequence[int]) -> Rows:
    """Takes slabs for rows that have none, and makes them read zeros, durably.

    Returns:
        The rows' members; nothing is recorded yet.

    Raises:
        NoSpaceError: there are too few disks with a free slab; nothing was taken.
    """
    while True:
        found, taken = new_rows(len(rows), space.columns, space.slots), []
        try:
            for i in range(len(rows)):
                taken += _allocate_row(core, space, found[i])
            failed = zero_slabs(core, taken)
        except BaseException:
            _give_back(core, taken)
            raise
        if failed is None:
            return found
        _give_back(core, taken)  # without the disk that failed there may be room elsewhere


def _allocate_row(core: Core, space: SpaceState, row: npt.NDArray[np.void]) -> list[tuple[int, int]]:
    usable = [i for i, d in core.state.disks.items() if i in core.disks and takes_new_slabs(d, space)]
    count = space.columns * space.copies
    chosen = core.slabs.choose(usable, count, f"a row of space {space.name!r}")
    taken = []
    for number, index in enumerate(chosen):
        slab = core.slabs.take(index)
        taken.append((index, slab))
        row[number // space.copies, number % space.copies] = (index, IN_STEP, 0, slab)
    return taken


def release_members(core: Core, members: Rows) -> None:
    """Gives slabs back that were allocated and not recorded."""
    stored = members[members["state"] != NONE]
    _give_back(core, [(int(each["disk"]), int(each["slab"])) for each in stored])


def _give_back(core: Core, taken: Iterable[tuple[int, int]]) -> None:
    for index, slab in taken:
        core.slabs.release(index, slab)


def zero_slabs(core: Core, taken: Sequence[tuple[int, int]]) -> int | None:
    """Makes slabs read zeros, durably; or takes out a disk that fails, and returns its index.

    Raises:
        NoSpaceError: the host has no space for that.
    """
    for index in sorted({index for index, _ in taken}):
        device = core.disks[index].device
        try:
            for other, slab in taken:
                if other == index:
                    device.zero(core.place_of(index, slab), core.state.settings.slab)
            device.flush()
        except NoSpaceError:
            raise
        except ClosedError:
            raise
        except VhdxError as error:
            core.take_out(index, DiskStatus.IO_ERROR, str(error))
            return index
    return None
