# SPDX-License-Identifier: MIT
"""Finds pages of the BAT whose entries QEMU's bug 727 moved by one, and reconstructs them.

QEMU before 8.1 logged a change of the first entry of a 4 KiB page wrongly. It wrote the new entry,
and behind it all old entries of the page from the first one on. So each old entry moved to the next
block, and the last one was lost. This happens at most once per page, because QEMU places a block
only once. QEMU allocates places in file order. So entries placed before the page's first entry
moved, and entries placed after it did not. This is enough to reconstruct the page, unless a block
whose entry had moved away was written again.

A page counts as moved only if QEMU made the image, and if an entry stands where no block's entry
can be: in the slot of a sector bitmap, or behind the last block. Moving the entries back must
remove all such entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vhdx.arrays import np
from vhdx.errors import DamagedError, Reason
from vhdx.format import bat, log
from vhdx.format import header as headers
from vhdx.format.bat import BlockState
from vhdx.image.vhdx.allocation import Taken, bat_runs, is_payload

if TYPE_CHECKING:
    import numpy.typing as npt

    from vhdx import plane
    from vhdx.image.vhdx.structure import Structure

__all__ = ["ShiftedPage", "find_shifted_pages", "refuse_shifted_pages"]

_PER_PAGE = log.SECTOR // bat.ENTRY_SIZE
_CREATOR = "QEMU"
_NOT_THERE = "the entry that would have moved the others is not there"
_NOWHERE = "entries stand where no block's can, also when they are moved back"


@dataclass(frozen=True)
class ShiftedPage:
    """A page of the BAT whose entries moved.

    Attributes:
        index: of its first entry.
        entries: the original entries; None if they cannot be reconstructed.
        reason: why they cannot be reconstructed; part of a message.
        sure: whether the bug moved them; False if there is only an entry where none can be.
    """

    index: int
    entries: npt.NDArray[np.uint64] | None
    reason: str = ""
    sure: bool = True


def find_shifted_pages(structure: Structure, leaf: plane.Device) -> list[ShiftedPage]:
    """The pages of an image without a parent that show traces of the bug; changes nothing."""
    if structure.geometry.has_parent:
        return []
    if not headers.parse_creator(structure.overlay.read(0, 8 + 512)).startswith(_CREATOR):
        return []
    numbers = _marked_pages(structure, leaf)
    back = {number: _moved_back(structure, number) for number in numbers}
    whole = {n: entries for n, entries in back.items() if not isinstance(entries, str)}
    reasons = {n: entries for n, entries in back.items() if isinstance(entries, str)}
    lost = _return_lost_block(structure, leaf, whole)
    pages = []
    for number in numbers:
        reason = reasons.get(number, lost)
        entries = None if reason else whole[number]
        sure = reason not in {_NOT_THERE, _NOWHERE}
        pages.append(ShiftedPage(number * _PER_PAGE, entries, reason, sure))
    return pages


def refuse_shifted_pages(structure: Structure, leaf: plane.Device) -> None:
    """Refuses to write an image with moved pages: new data would take the places of lost blocks.

    Raises:
        DamagedError: reason BAT_SHIFTED.
    """
    for page in find_shifted_pages(structure, leaf):
        if not page.sure:
            continue  # the stray entry belongs to no block, so nothing is lost
        raise DamagedError(
            "QEMU's bug 727 moved entries of its BAT, and writing would make the damage permanent",
            reason=Reason.BAT_SHIFTED,
            offset=structure.bat.offset + page.index * bat.ENTRY_SIZE,
            hint="convert what can be read to a new image"
            if page.entries is None
            else "repair it with check --repair, then check the files in it",
        )


def _page(structure: Structure, number: int) -> npt.NDArray[np.uint64]:
    """The entries of a page; the region is a multiple of 1 MiB, so a page is always whole."""
    data = structure.overlay.read(structure.bat.offset + number * log.SECTOR, log.SECTOR)
    return np.frombuffer(data, "<u8").astype(np.uint64)


def _payload_of(structure: Structure, number: int) -> npt.NDArray[np.bool_]:
    first = number * _PER_PAGE
    return is_payload(structure, np.arange(first, first + _PER_PAGE, dtype=np.uint64))


def _is_placed(entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    result: npt.NDArray[np.bool_] = bat.state_of(entries) == BlockState.FULLY_PRESENT
    return result


def _marked_pages(structure: Structure, leaf: plane.Device) -> list[int]:
    """Pages with an entry where no block's can stand."""
    found: set[int] = set()
    for first, values in bat_runs(structure, leaf):
        indices = np.arange(first, first + len(values), dtype=np.uint64)
        wrong = _is_placed(values) & ~is_payload(structure, indices)
        found.update((indices[wrong] // np.uint64(_PER_PAGE)).tolist())
    last = (structure.geometry.entries - 1) // _PER_PAGE  # its rest is behind the last block
    if (_is_placed(_page(structure, last)) & ~_payload_of(structure, last)).any():
        found.add(last)
    return sorted(found)


def _moved_back(structure: Structure, number: int) -> npt.NDArray[np.uint64] | str:
    """The page before the bug, with its last entry zero; or why it cannot be reconstructed."""
    now, payload = _page(structure, number), _payload_of(structure, number)
    offsets, placed = bat.offset_of(now), _is_placed(now)
    if not placed[0]:
        return _NOT_THERE
    late = placed & (offsets > offsets[0])  # placed after the others had moved
    late[0] = True
    before = np.zeros_like(now)
    before[:-1] = np.where(late[1:], np.uint64(0), now[1:])
    moved = _is_placed(before)
    if (moved & late).any():
        return "a block was written again after its entry had moved away"
    result = np.where(late, now, before)
    if (_is_placed(result) & ~payload).any():
        return _NOWHERE
    return result


def _return_lost_block(
    structure: Structure, leaf: plane.Device, pages: dict[int, npt.NDArray[np.uint64]]
) -> str:
    """Restores the last entry of a page, if exactly one place of the file belongs to nothing.

    Returns:
        "", or why none of the pages can be reconstructed.
    """
    block = structure.geometry.block_size
    taken = Taken(structure, structure.overlay.size)
    moved = np.zeros(structure.geometry.entries // _PER_PAGE + 1, np.bool_)
    moved[list(pages)] = True
    try:
        for first, values in bat_runs(structure, leaf):
            indices = np.arange(first, first + len(values), dtype=np.uint64)
            mine = _is_placed(values) & is_payload(structure, indices)
            mine &= ~moved[(indices // np.uint64(_PER_PAGE)).astype(np.int64)]
            taken.claim(indices[mine], bat.offset_of(values[mine]), block)
        for number, entries in pages.items():
            indices = np.arange(number * _PER_PAGE, (number + 1) * _PER_PAGE, dtype=np.uint64)
            mine = _is_placed(entries)
            taken.claim(indices[mine], bat.offset_of(entries[mine]), block)
    except DamagedError:
        return "two blocks would share one place"
    gaps = taken.gaps(block)
    if not len(gaps):
        return ""
    losing = [n for n, e in pages.items() if _payload_of(structure, n)[-1] and not _is_placed(e)[-1]]
    fitting = [n for n in losing if gaps[0] < bat.offset_of(pages[n][:1])[0]]
    if len(gaps) > 1 or len(losing) != 1 or not fitting:
        return "places of the file belong to nothing, and it is unknown which blocks they held"
    pages[losing[0]][-1] = gaps[0] | np.uint64(BlockState.FULLY_PRESENT)
    return ""
