# SPDX-License-Identifier: MIT
"""Scrubbing: compares the copies of mirrors, and repairs what most copies agree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
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
        differences: the first hundred.
        complete: it was not stopped.
    """

    compared: int = 0
    different: int = 0
    ties: int = 0
    repaired: int = 0
    differences: list[Difference] = field(default_factory=list)
    complete: bool = True

    @property
    def text(self) -> str:
        """One line for people."""
        if not self.different:
            return "all copies are equal"
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
        (space, row)
        for space in spaces
        if space.state.copies > 1
        for row in space.state.stored_rows().tolist()
    ]
    total = sum(slab * space.state.columns for space, _ in work)
    for space, row in work:
        if space.unreconciled[row]:
            continue  # its copies may differ, and are being made equal
        for column in range(space.state.columns):
            for at in range(0, slab, _PIECE):
                if cancel is not None and cancel():
                    found.complete = False
                    return found
                length = min(_PIECE, slab - at)
                for difference, verdict in _compare(core, space, row, column, at, length):
                    _note(found, difference)
                    if repair and not difference.is_tie:
                        _mend(space, row, column, difference.offset, verdict)
                        found.repaired += 1
                found.compared += length
                if progress is not None:
                    progress(found.compared, max(total, found.compared))
    return found


def _compare(
    core: Core, space: Attached, row: int, column: int, at: int, length: int
) -> Iterator[tuple[Difference, int]]:
    verdicts = space.layout.compare(row, column, at, length)
    for block in np.flatnonzero(verdicts).tolist():
        verdict = int(verdicts[block])
        members = space.state.rows[row, column]
        disks = [
            core.state.disks[int(members[slot]["disk"])].name
            for slot in range(space.state.slots)
            if verdict >> slot & 1
        ]
        offset = at + block * plane.COMPARED_BLOCK
        tie = bool(verdict & plane.TIE)
        yield Difference(space.state.name, row, column, offset, disks, tie), verdict


def _note(found: Scrubbed, difference: Difference) -> None:
    found.different += 1
    found.ties += difference.is_tie
    if len(found.differences) < _MOST_REPORTED:
        found.differences.append(difference)


def _mend(space: Attached, row: int, column: int, offset: int, verdict: int) -> None:
    """Copies a block from a member of the majority to those that differ from it."""
    slots = space.state.slots
    entries = space.layout.read_entries(row, 1)[0]
    good = next(
        slot
        for slot in range(slots)
        if not verdict >> slot & 1 and plane.is_read(int(entries[column * slots + slot]))
    )
    for slot in range(slots):
        if verdict >> slot & 1:
            space.layout.copy(
                row, column * slots + good, column * slots + slot, offset, plane.COMPARED_BLOCK
            )
