# SPDX-License-Identifier: MIT
"""Loads BAT entries into the map of a VHDX file ([MS-VHDX] 2.5), and drops the oldest chunks."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import DamagedError
from vhdx.format import bat
from vhdx.image.vhdx.allocation import bat_runs, check_entries
from vhdx.image.vhdx.entries import entries_of

if TYPE_CHECKING:
    import threading

    import numpy.typing as npt

    from vhdx.image.vhdx.bitmaps import SectorBitmaps
    from vhdx.image.vhdx.structure import Structure
    from vhdx.place import ImageFile

__all__ = ["Loader"]

_RESIDENT_CHUNKS = 4096
_RANGE_PAGES = 4096


class Loader:
    """Installs entries of blocks in a map.

    Args:
        host: the file.
        structure: of the file.
        device: the map.
        bitmaps: of partially present blocks.
        lock: guards the set of resident chunks; held while entries are read and installed.
    """

    def __init__(
        self,
        host: ImageFile,
        structure: Structure,
        device: plane.Map,
        bitmaps: SectorBitmaps,
        lock: threading.Lock,
    ) -> None:
        self._host = host
        self._structure = structure  # under the lock
        self._map = device
        self._bitmaps = bitmaps
        self._lock = lock
        self._resident: OrderedDict[int, None] = OrderedDict()  # under the lock

    def adopt(self, structure: Structure) -> None:
        """Switches to a new structure; the caller holds the lock."""
        self._structure = structure

    def load(self, first: int, count: int) -> None:
        """Installs the entries of these blocks from the BAT ([MS-VHDX] 2.5)."""
        start = first // plane.CHUNK_PAGES * plane.CHUNK_PAGES
        stop = min(
            -(-(first + count) // plane.CHUNK_PAGES) * plane.CHUNK_PAGES,
            self._structure.geometry.blocks,
        )
        if stop <= start:
            return
        with self._lock:
            # The lock keeps an entry read before a commit from being installed after it.
            blocks = np.arange(start, stop, dtype=np.uint64)
            indices = self._structure.geometry.indices(blocks)
            base = int(indices[0])
            data = self._structure.overlay.read(
                self._structure.bat.offset + base * bat.ENTRY_SIZE,
                (int(indices[-1]) + 1 - base) * bat.ENTRY_SIZE,
            )
            table = np.frombuffer(data, "<u8").astype(np.uint64)
            values = table[(indices - np.uint64(base)).astype(np.int64)]
            bad, error = check_entries(self._structure, indices, values, self._structure.overlay.size)
            entries = entries_of(self._structure.geometry, blocks, values)
            if error is not None:
                error.path = self._host.path
                entries[bad] = 0
            failures = self._set_bitmaps(blocks, entries)
            self._map.install(start, entries)
            self._note_resident(start, stop)
        if error is not None and bad[first - start : first - start + count].any():
            raise error
        for block, failure in failures.items():
            if first <= block < first + count:
                raise failure

    def _set_bitmaps(
        self, blocks: npt.NDArray[np.uint64], entries: npt.NDArray[np.uint64]
    ) -> dict[int, DamagedError]:
        """Gives C the bitmaps of mixed blocks; returns the errors of damaged bitmaps by block."""
        failures: dict[int, DamagedError] = {}
        kinds, _, _ = plane.fields(entries)
        for i in np.flatnonzero(kinds == plane.Kind.MIXED).tolist():
            block = int(blocks[i])
            try:
                bits = self._bitmaps.load(block)
            except DamagedError as error:
                failures[block] = error
                entries[i] = 0
            else:
                self._map.set_bitmap(block, bits)
        return failures

    def _note_resident(self, start: int, stop: int) -> None:
        for chunk in range(start // plane.CHUNK_PAGES, -(-stop // plane.CHUNK_PAGES)):
            self._resident[chunk] = None
            self._resident.move_to_end(chunk)
        excess = len(self._resident) - _RESIDENT_CHUNKS
        if excess > 0:
            # Drop more than the excess, so that not every load has to drop chunks.
            oldest = list(self._resident)[: excess + _RESIDENT_CHUNKS // 8]
            for chunk in oldest:
                if self._map.drop(chunk, 1):
                    del self._resident[chunk]

    def stored_ranges(self) -> list[tuple[int, int]]:
        """Byte ranges of the disk; outside of them every BAT entry of this layer is zero.

        The time depends on the allocated part of the BAT, not on the size of the disk, unless there
        is a log to replay.
        """
        with self._lock:
            # Uncommitted entries are in memory only, in chunks that are never dropped. Note these
            # chunks first: entries committed later are in the BAT when it is read below.
            resident = np.array(sorted(self._resident), np.uint64) * np.uint64(plane.CHUNK_PAGES)
        ratio = np.uint64(self._structure.geometry.chunk_ratio + 1)
        firsts, lasts = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for first, values in bat_runs(self._structure, self._host.leaf):
            pages = np.unique((np.flatnonzero(values) + first) // plane.CHUNK_PAGES)
            low = pages.astype(np.uint64) * np.uint64(plane.CHUNK_PAGES)
            high = low + np.uint64(plane.CHUNK_PAGES)
            firsts.append(low - low // ratio)
            lasts.append(high - high // ratio)
        firsts.append(resident)
        lasts.append(resident + np.uint64(plane.CHUNK_PAGES))
        return _united(
            np.concatenate(firsts),
            np.concatenate(lasts),
            self._structure.geometry.block_size,
            self._structure.geometry.virtual_size,
        )

    def entry_of(self, page: int) -> np.uint64:
        """The entry of a block, loaded if it was dropped; 0 behind the last block."""
        while page < self._structure.geometry.blocks:
            entry: np.uint64 = self._map.read_entries(page, 1)[0]
            if entry:
                return entry
            self.load(page, 1)
        return np.uint64(0)

    def forget(self, first: int, past: int) -> None:
        """Resets the map entries of blocks that the disk no longer has."""
        for start in range(first, past, _RANGE_PAGES):
            pages = np.arange(start, min(start + _RANGE_PAGES, past), dtype=np.uint64)
            found = self._map.read_entries(start, len(pages))
            known = found != 0
            self._map.replace(
                pages[known], found[known], np.zeros(int(known.sum()), np.uint64), publish=False
            )


def _united(
    firsts: npt.NDArray[np.uint64], lasts: npt.NDArray[np.uint64], block: int, size: int
) -> list[tuple[int, int]]:
    """Converts block ranges to byte ranges below ``size``, and merges ranges that touch."""
    order = np.argsort(firsts, kind="stable")
    found: list[tuple[int, int]] = []
    for first, last in zip(firsts[order].tolist(), lasts[order].tolist(), strict=True):
        start, end = min(first * block, size), min(last * block, size)
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif start < end:
            found.append((start, end))
    return found
