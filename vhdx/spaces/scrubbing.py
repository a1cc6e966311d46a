# SPDX-License-Identifier: MIT
"""Scrubbing: compares the copies of mirrors, and repairs what most copies agree on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import ClosedError, VhdxError
from vhdx.units import MIB

if TYPE_CHECKING:
    from vhdx.interrupts import Cancel, Progress
    from vhdx.spaces.core import Attached, Core

__all__ = ["Difference", "Scrubbed", "scrub"]

_PIECE = 8 * MIB
_MOST_REPORTED = 100


@dataclass(frozen=True)
class Difference:
    """Copies of a block that differ.

    Attributes:
        space: name.
        row, column: of the block.
        offset: bytes, in the slabs.
        disks: names of those that differ from most; all if there is no majority.
        is_tie: no content has a majority.
    """

    space: str
    row: int
    column: int
    offset: int
    disks: list[str]
    is_tie: bool


@dataclass
class Scrubbed:
    """What a scrub found.

    Attributes:
        compared: bytes of each copy.
        different: blocks of 4 KiB whose copies differ.
        ties: those of them where no content has a majority; they were not touched.
        repaired: those that were made equal.
        unread: bytes that could not be compared.
        failure: why not, the last time.
        differences: the first hundred.
        complete: it was not stopped.
    """

    compared: int = 0
    different: int = 0
    ties: int = 0
    repaired: int = 0
    unread: int = 0
    failure: str | None = None
    differences: list[Difference] = field(default_factory=list)
    complete: bool = True

    @property
    def text(self) -> str:
        """One line for people."""
        if self.unread:
            return f"{self._differences}; {self.unread} bytes could not be compared: {self.failure}"
        return self._differences

    @property
    def _differences(self) -> str:
        if not self.different:
            return "all copies are equal" if self.complete else "it was stopped"
        ties = f", {self.ties} have no majority" if self.ties else ""
        return f"{self.different} blocks differ; {self.repaired} were repaired{ties}"


def scrub(
    core: Core,
    spaces: Sequence[Attached],
    *,
    repair: bool,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Scrubbed:
    """Compares all copies of these spaces; see :meth:`vhdx.Pool.scrub`."""
    found = Scrubbed()
    slab = core.state.settings.slab
    work = [
        (space, row, state.columns)
        for space, state in [(space, space.state) for space in spaces]
        if state.copies > 1
        for row in state.stored_rows().tolist()
    ]
    total = sum(slab * columns for _, _, columns in work)
    for space, row, columns in work:
        if row >= len(space.unreconciled) or space.unreconciled[row]:
            continue  # its copies may differ, and are being made equal
        for column in range(columns):
            for at in range(0, slab, _PIECE):
                if cancel is not None and cancel():
                    found.complete = False
                    return found
                length = min(_PIECE, slab - at)
                try:
                    _compare(core, space, row, column, at, length, found, repair=repair)
                except ClosedError:  # the space is gone
                    found.complete = False
                    break
                except VhdxError as error:
                    found.unread += length
                    found.failure = str(error)
                if progress is not None:
                    progress(found.compared + found.unread, max(total, found.compared))
    return found


def _compare(
    core: Core,
    space: Attached,
    row: int,
    column: int,
    at: int,
    length: int,
    found: Scrubbed,
    *,
    repair: bool,
) -> None:
    """Compares the copies of a piece of a column."""
    slots = space.state.slots
    with core.lock:
        members = space.state.rows[row, column].copy()
    for _ in range(slots):  # a disk that fails is taken out, and the others are compared
        try:
            verdicts = space.layout.compare(row, column, at, length)
            break
        except VhdxError as error:
            those = range(column * slots, (column + 1) * slots)
            if core.read_only or not core.blame(space, row, those, error):
                raise
    else:
        raise VhdxError("there are no copies to compare", path=space.layout.path)
    found.compared += length
    for block in np.flatnonzero(verdicts).tolist():
        verdict = int(verdicts[block])
        offset = at + block * plane.COMPARED_BLOCK
        with core.lock:
            if (space.state.rows[row, column] != members).any():
                return  # the row has moved since: this says nothing of where it is now
            disks = [
                core.state.disks[int(members[slot]["disk"])].name
                for slot in range(slots)
                if verdict >> slot & 1
            ]
            is_tie = bool(verdict & plane.TIE)
            _note(found, Difference(space.state.name, row, column, offset, disks, is_tie))
            if repair and not is_tie:
                found.repaired += _mend(space, row, column, offset, verdict)


def _note(found: Scrubbed, difference: Difference) -> None:
    found.different += 1
    found.ties += difference.is_tie
    if len(found.differences) < _MOST_REPORTED:
        found.differences.append(difference)


def _mend(space: Attached, row: int, column: int, offset: int, verdict: int) -> bool:
    """Copies a block from a member of the majority to those that differ from it."""
    slots = space.state.slots
    entries = space.layout.read_entries(row, 1)[0]
    agreeing = (
        slot
        for slot in range(slots)
        if not verdict >> slot & 1 and plane.is_read(int(entries[column * slots + slot]))
    )
    good = next(agreeing, None)
    if good is None:
        return False
    for slot in range(slots):
        if verdict >> slot & 1:
            space.layout.copy(
                row, column * slots + good, column * slots + slot, offset, plane.COMPARED_BLOCK
            )
    return True
