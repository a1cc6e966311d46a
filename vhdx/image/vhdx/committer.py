# SPDX-License-Identifier: MIT
"""Makes changes of a VHDX file's metadata durable through its log.

The caller serialises the calls: a commit and another change of metadata never run at once.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import InvalidArgumentError, NoSpaceError
from vhdx.format import bat
from vhdx.format.bat import BlockState
from vhdx.image.vhdx.entries import is_placed
from vhdx.image.vhdx.journal import MOST_PAGES, Journal
from vhdx.units import MIB

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

    import numpy.typing as npt

    from vhdx.image.vhdx.allocator import Allocator
    from vhdx.image.vhdx.bitmaps import SectorBitmaps
    from vhdx.image.vhdx.structure import Structure

__all__ = ["Committer"]

_COMMIT_PAGES = 1024


class Committer:
    """Turns published entries into BAT entries, and logs whatever else changes.

    Args:
        structure: of the file.
        leaf: the file.
        device: the map; it is poisoned when the state of the log is unknown.
        bitmaps: of partially present blocks.
        allocator: places sector bitmap blocks, and frees the space that a commit releases.
        anchors: soft anchors (offsets in UNMAPPED and UNDEFINED entries) claimed at open.
        lock: guards the bitmaps' places.

    Attributes:
        journal: the log and the headers.
        referenced_end: the file size in bytes that log entries may require.
    """

    def __init__(
        self,
        structure: Structure,
        leaf: plane.Device,
        device: plane.Map,
        bitmaps: SectorBitmaps,
        allocator: Allocator,
        anchors: set[int],
        lock: threading.Lock,
    ) -> None:
        # Rounds and changes of other metadata hold the engine's commit lock, which guards every field
        # that changes.
        self._structure = structure
        self._leaf = leaf
        self._map = device
        self._bitmaps = bitmaps  # its own state is under the lock
        self._allocator = allocator
        self._anchors = anchors
        self._lock = lock
        self.journal = Journal(leaf, structure.header)
        self.referenced_end = leaf.size

    def adopt(self, structure: Structure) -> None:
        """Switches to a new structure."""
        self._structure = structure
        self.journal.forget()

    def reach(self, end: int) -> None:
        """Lets log entries require at least ``end`` bytes of the file, which has them already."""
        self.referenced_end = max(self.referenced_end, end)

    # ---- blocks ----

    def commit(self, changes: plane.Changes) -> None:
        """Writes sector bitmaps and BAT entries through the log; their data is durable already."""
        self.journal.barrier_passed()
        # The last publication of a block counts.
        blocks, last = np.unique(changes.pages[::-1], return_index=True)
        kinds, offsets, tags = plane.fields(changes.entries[::-1][last])
        stored = is_placed(kinds)
        offsets[~stored] = 0
        if stored.any():
            # The block was granted before it was published, so the barrier covered the file size.
            end = int(offsets.max()) + self._structure.geometry.block_size
            self.referenced_end = max(self.referenced_end, end)
        # Bitmaps come before the BAT entries that make them effective.
        logged = self._commit_bitmaps(changes, blocks[kinds != plane.Kind.MIXED])
        if not logged and not len(blocks):
            self._leaf.flush()  # the data flush before it may have kept the order only
        values = bat.pack_entries(tags & np.uint64(7), offsets)
        anchors = self._commit_entries(blocks, values)
        self._allocator.settle(changes.generation, anchors)

    def _commit_bitmaps(self, changes: plane.Changes, others: npt.NDArray[np.uint64]) -> bool:
        """Logs and applies the bitmaps of blocks that stay partially present; whether it did."""
        if not len(changes.bitmap_pages):
            return False
        wanted = ~np.isin(changes.bitmap_pages, others)
        blocks = changes.bitmap_pages[wanted]
        if not len(blocks):
            return False
        order = np.argsort(blocks)
        blocks, bitmaps = blocks[order], changes.bitmaps[wanted][order]
        with self._lock:
            chunks = self._bitmaps.missing(blocks)
            places = self._allocator.place_bitmaps(len(chunks))
        if chunks:
            self.journal.forget()
            self.reach(max(places) + MIB)
            self._leaf.flush()  # the file's new length and the zeros in it
            positions = np.array([self._bitmaps.position(c) for c in chunks], np.uint64)
            states = np.full(len(chunks), bat.BitmapState.PRESENT, np.uint64)
            self._commit_sectors(positions, bat.pack_entries(states, np.array(places, np.uint64)))
            with self._lock:
                self._bitmaps.place(chunks, places)
        logged = bool(chunks)
        for offsets, pages in self._bitmaps.pages(blocks, bitmaps, self.journal.read):
            if len(offsets):
                self.journal.commit(offsets, pages, self.referenced_end)
                logged = True
        return logged

    def _commit_entries(
        self, blocks: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint64]:
        """Logs and applies BAT entries; returns the soft anchors that they replace."""
        positions = self._structure.bat.offset + self._structure.geometry.indices(blocks) * np.uint64(
            8
        )
        sectors = positions // np.uint64(4096)
        anchors = [np.empty(0, np.uint64)]
        starts = np.flatnonzero(np.concatenate(([True], np.diff(sectors) != 0)))
        for first in range(0, len(starts) if len(blocks) else 0, _COMMIT_PAGES):
            following = first + _COMMIT_PAGES
            stop = starts[following] if following < len(starts) else len(sectors)
            some = slice(int(starts[first]), int(stop))
            anchors.append(self._commit_sectors(positions[some], values[some]))
        return np.concatenate(anchors)

    def _commit_sectors(
        self, positions: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint64]:
        """Logs and applies entries at ascending positions; returns the soft anchors they replace."""
        sectors = positions // np.uint64(4096)
        starts = np.concatenate(([True], np.diff(sectors) != 0))
        offsets = sectors[starts] * np.uint64(4096)
        inverse = np.cumsum(starts) - 1
        contents = self.journal.read(offsets)
        table = contents.reshape(-1).view("<u8")
        slots = inverse * 512 + ((positions % np.uint64(4096)) // np.uint64(8)).astype(np.int64)
        old = table[slots].astype(np.uint64)
        states, anchors = bat.state_of(old), bat.offset_of(old)
        anchored = (states == BlockState.UNDEFINED) | (states == BlockState.UNMAPPED)
        table[slots] = values
        self.journal.commit(offsets, contents, self.referenced_end)
        # Only anchors claimed at open: any other place may belong to another block by now.
        released = self._anchors.intersection(anchors[anchored].tolist())
        self._anchors -= released
        return np.array(sorted(released), np.uint64)

    # ---- the rest of the metadata ----

    def restart(self, end: int) -> None:
        """Begins a new log for a file of ``end`` bytes; earlier entries are never replayed."""
        self.referenced_end = end
        with self._poisoning():
            self.journal.restart(end)

    def forget_log(self) -> None:
        """Begins a new log before logged pages of metadata are changed in place.

        A reader that replays more than the newest entry would undo such a change. The caller has
        flushed, so the file's size is durable.
        """
        self.restart(self.referenced_end)

    @contextlib.contextmanager
    def _poisoning(self) -> Iterator[None]:
        """Poisons the map after a failure that leaves the state of the log unknown."""
        try:
            yield
        except NoSpaceError:
            raise
        except BaseException:
            self._map.poison()
            raise

    def log(self, patches: list[tuple[int, bytes]]) -> None:
        """Changes these bytes of the file (offset, data) in one log entry."""
        pages: dict[int, bytearray] = {}
        for offset, data in patches:
            done = 0
            while done < len(data):
                page, within = divmod(offset + done, 4096)
                content = pages.setdefault(page * 4096, bytearray(self._leaf.read(4096, page * 4096)))
                part = min(4096 - within, len(data) - done)
                content[within : within + part] = data[done : done + part]
                done += part
        offsets = np.array(sorted(pages), np.uint64)
        contents = np.frombuffer(b"".join(pages[at] for at in sorted(pages)), np.uint8)
        if len(pages) > MOST_PAGES:
            raise InvalidArgumentError(f"{len(pages)} pages do not fit into a log entry")
        try:
            self.journal.commit(offsets, contents.reshape(-1, 4096), self.referenced_end)
        except BaseException:
            self._map.poison()  # the entry may be durable but not applied
            raise
