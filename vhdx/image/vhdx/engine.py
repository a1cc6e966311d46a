# SPDX-License-Identifier: MIT
"""The VHDX engine: it answers the faults of an image's map.

Python decides where every block lives; C moves the bytes. The map has one page a payload block. An
entry's tag keeps the block's state, so the table can be turned back into BAT entries.

Threads: faults come from any thread. ``_lock`` guards space and table residency and is never held
across a barrier; ``_gate_lock`` makes the first change happen once; commits are serialised by the
map's rounds, and kept apart from other changes of metadata by ``_commit_lock``. Whoever moves or
releases blocks other than by a commit holds ``structure_lock``. Order: structure, commit, space.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import (
    ClosedError,
    DamagedError,
    InvalidArgumentError,
    NoSpaceError,
    PoisonedError,
    ReadOnlyError,
)
from vhdx.format import bat
from vhdx.format.bat import BlockState
from vhdx.image.reclaim import flush_soon
from vhdx.image.vhdx import journal
from vhdx.image.vhdx.allocation import bat_runs, check_entries, survey
from vhdx.image.vhdx.bitmaps import SectorBitmaps
from vhdx.image.vhdx.entries import OWN, PARENT, entries_of, hole_of, is_placed
from vhdx.image.vhdx.space import Space
from vhdx.units import GIB, MIB, TIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    import numpy.typing as npt

    from vhdx.format import region
    from vhdx.format.header import Header
    from vhdx.image.host import HostFile
    from vhdx.image.vhdx.structure import Structure

__all__ = ["Engine"]

LARGEST_DISK = 64 * TIB
_SURVEY_ENTRIES = 1 << 17  # a table of up to 1 MiB is validated whole, also for reading
_RESIDENT_CHUNKS = 4096
_RANGE_PAGES = 4096
_COMMIT_PAGES = 1024
_FIRST_GRANT, _LARGEST_GRANT = 64 * MIB, 4 * GIB
_MOST_WAITING = 64 * MIB  # of released space, before a commit is asked for at once


class Engine:
    """Fault handler of one open VHDX file.

    Args:
        host: the file; it belongs to the engine from here on.
        structure: of the file.
        parent: device of the parent, for a differencing image.
        write: whether the image may be changed.
        pool: for background work.
        data_write_guid: what the first change makes the DataWriteGuid; a new one when None.
        data: where blocks are read, if not in the file.
    """

    def __init__(
        self,
        host: HostFile,
        structure: Structure,
        parent: plane.Device | None,
        *,
        write: bool,
        pool: plane.Pool,
        data_write_guid: UUID | None = None,
        data: plane.Device | None = None,
    ) -> None:
        self.host = host
        self.structure = structure
        self._leaf = host.leaf
        self._geometry = structure.geometry
        self._lock = threading.Lock()
        self._gate_lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self.structure_lock = threading.Lock()
        self._resident: OrderedDict[int, None] = OrderedDict()
        self._closed = False
        self._frozen = False  # by a snapshot: faults that come late do nothing
        self._data_write_guid = data_write_guid
        self._journal = journal.Journal(self._leaf, structure.header)
        self._space: Space | None = None
        self._furthest = 0
        self._anchors: set[int] = set()
        self._bitmaps = SectorBitmaps(structure, host.leaf, host.path)
        self._grant_bytes = _FIRST_GRANT
        self._bitmap_stock: list[int] = []
        self._referenced_end = self._leaf.size
        if write or self._geometry.entries <= _SURVEY_ENTRIES:
            taken = survey(structure, self._leaf)
            if write:
                self._furthest = taken.furthest
                self._anchors = taken.anchors
                self._space = Space(self._leaf, taken, self._geometry.block_size, sparse=host.sparse)
        own = self._leaf if data is None else data
        lowers = [own] if parent is None else [own, parent]
        self.map = plane.Map(
            self,
            self._geometry.virtual_size,
            LARGEST_DISK,
            self._geometry.block_size,
            lowers,
            parent=None if parent is None else PARENT,
            sectors=plane.Sectors(
                self._geometry.logical_sector_size,
                BlockState.PARTIALLY_PRESENT,
                BlockState.FULLY_PRESENT,
            ),
            in_place=structure.parameters.leave_blocks_allocated
            and not structure.parameters.has_parent,
            read_only=not write,
            gated=write,
            pool=pool,
            path=host.path,
        )

    @property
    def header(self) -> Header:
        """The current header."""
        return self._journal.header

    # ---- loading ----

    def load(self, first: int, count: int) -> None:
        """Installs the entries of these blocks from the BAT ([MS-VHDX] 2.5)."""
        start = first // plane.CHUNK_PAGES * plane.CHUNK_PAGES
        stop = min(
            -(-(first + count) // plane.CHUNK_PAGES) * plane.CHUNK_PAGES, self._geometry.blocks
        )
        if stop <= start:
            return
        with self._lock:
            # Under the lock, so that no entry that was read before a commit is installed after it.
            blocks = np.arange(start, stop, dtype=np.uint64)
            indices = self._geometry.indices(blocks)
            base = int(indices[0])
            data = self.structure.overlay.read(
                self.structure.bat.offset + base * bat.ENTRY_SIZE,
                (int(indices[-1]) + 1 - base) * bat.ENTRY_SIZE,
            )
            table = np.frombuffer(data, "<u8").astype(np.uint64)
            values = table[(indices - np.uint64(base)).astype(np.int64)]
            bad, error = check_entries(self.structure, indices, values, self.structure.overlay.size)
            entries = entries_of(self._geometry, blocks, values)
            if error is not None:
                error.path = self.host.path
                entries[bad] = 0
            failures = self._set_bitmaps(blocks, entries)
            self.map.install(start, entries)
            self._note_resident(start, stop)
        if error is not None and bad[first - start : first - start + count].any():
            raise error
        for block, failure in failures.items():
            if first <= block < first + count:
                raise failure

    def _set_bitmaps(
        self, blocks: npt.NDArray[np.uint64], entries: npt.NDArray[np.uint64]
    ) -> dict[int, DamagedError]:
        """Gives C the bitmaps of mixed blocks; blocks without a good one, and why."""
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
                self.map.set_bitmap(block, bits)
        return failures

    def _note_resident(self, start: int, stop: int) -> None:
        for chunk in range(start // plane.CHUNK_PAGES, -(-stop // plane.CHUNK_PAGES)):
            self._resident[chunk] = None
            self._resident.move_to_end(chunk)
        excess = len(self._resident) - _RESIDENT_CHUNKS
        if excess > 0:
            # The oldest go, and some more, so that not every load has to drop.
            oldest = list(self._resident)[: excess + _RESIDENT_CHUNKS // 8]
            for chunk in oldest:
                if self.map.drop(chunk, 1):
                    del self._resident[chunk]

    def stored_ranges(self) -> list[tuple[int, int]]:
        """Ranges of the disk, bytes; outside of them every entry of this layer is empty.

        The time depends on the stored part of the BAT, and not on the size of the disk.
        """
        with self._lock:
            # Uncommitted entries are in memory only, in chunks that are never dropped. They are noted
            # first: what is committed meanwhile is in the table then.
            resident = np.array(sorted(self._resident), np.uint64) * np.uint64(plane.CHUNK_PAGES)
        ratio = np.uint64(self._geometry.chunk_ratio + 1)
        firsts, lasts = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
        for first, values in bat_runs(self.structure, self._leaf):
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
            self._geometry.block_size,
            self._geometry.virtual_size,
        )

    # ---- changing ----

    def open_gate(self) -> None:
        """Headers and log before the first change ([MS-VHDX] 2.2.2)."""
        with self._gate_lock:
            if self._closed:
                raise ClosedError("the disk was closed", path=self.host.path)
            if self._frozen:
                return  # a snapshot was taken: the request comes back and goes to the child
            try:
                if not self._journal.is_open:
                    self._journal.open(self._leaf.size, self._data_write_guid)
                if self._furthest > self._leaf.size:
                    # The file ends inside its last block, as QEMU's fixed images do.
                    self._leaf.resize(self._furthest)
            except BaseException:
                # Which of its steps are durable is not known.
                self.map.poison()
                raise
            self.map.set_gate(is_open=True)

    def grant(self, wanted: int) -> None:
        """Hands ready blocks to C: reused ones, zeroed, then fresh ones past the end."""
        assert self._space is not None
        block = self._geometry.block_size
        with self._lock:
            if self._closed and wanted:
                raise ClosedError("the disk was closed", path=self.host.path)
            if self._closed or self._frozen:
                return
            # Ahead only as many as the disk lacks, so that its file never gets much longer than it.
            lacking = self._geometry.blocks - self._space.kept
            count = max(wanted, min(self._grant_bytes // block, lacking))
            if count <= 0:
                return
            try:
                offsets = self._space.take(count)
            except NoSpaceError:
                self._grant_bytes = _FIRST_GRANT
                if wanted == 0:
                    return  # nobody waits; who needs space will be told
                offsets = self._space.take(wanted)
            self._grant_bytes = min(2 * self._grant_bytes, _LARGEST_GRANT)
            if not self.host.sparse:
                self._grant_bytes = _FIRST_GRANT
            self.map.grant(OWN, offsets, BlockState.FULLY_PRESENT)

    def change_range(self, operation: plane.Operation, first: int, count: int, size: int) -> None:
        """Whole blocks become ZERO or UNMAPPED and give their space back."""
        with self.structure_lock:
            if self._frozen:
                return  # a snapshot was taken: the request comes back and goes to the child
            if (
                size != self._geometry.virtual_size
                and (first + count) * self.structure.geometry.block_size > size
            ):
                count -= 1  # the last block was shorter then, and may hold more by now
            # A disk that was made smaller meanwhile refuses the request when it comes back.
            self._change_range(operation, first, min(count, self._geometry.blocks - first))

    def _change_range(self, operation: plane.Operation, first: int, count: int) -> None:
        state = BlockState.ZERO if operation == plane.Operation.ZERO else BlockState.UNMAPPED
        new_hole = hole_of(state)
        for start in range(first, first + count, _RANGE_PAGES):
            pages = np.arange(start, min(start + _RANGE_PAGES, first + count), dtype=np.uint64)
            while len(pages):
                pages = self._change_pages(pages, new_hole, state)

    def _change_pages(
        self, pages: npt.NDArray[np.uint64], new_hole: npt.NDArray[np.uint64], state: BlockState
    ) -> npt.NDArray[np.uint64]:
        """One attempt; returns the pages that changed under it."""
        low, high = int(pages[0]), int(pages[-1]) + 1
        found = self.map.read_entries(low, high - low)[(pages - np.uint64(low)).astype(np.int64)]
        kinds, offsets, _ = plane.fields(found)
        if (kinds == plane.Kind.ASK).any():
            self.load(low, high - low)
            return pages
        wanted = found != new_hole
        if state == BlockState.UNMAPPED:
            wanted &= kinds != plane.Kind.HOLE  # what holds nothing stays as it is
        pages, found = pages[wanted], found[wanted]
        if not len(pages):
            return pages
        kinds, offsets = kinds[wanted], offsets[wanted]
        mismatched = self.map.replace(pages, found, np.full(len(pages), new_hole, np.uint64))
        done = ~mismatched & is_placed(kinds)
        if done.any():
            assert self._space is not None
            self.release_later(offsets[done])
        return pages[mismatched]

    def commit(self, changes: plane.Changes) -> None:
        """Writes sector bitmaps and BAT entries through the log; their data are durable."""
        with self._commit_lock:
            self._commit(changes)

    def _commit(self, changes: plane.Changes) -> None:
        assert self._space is not None
        self._journal.barrier_passed()
        # The last publication of a block counts.
        blocks, last = np.unique(changes.pages[::-1], return_index=True)
        kinds, offsets, tags = plane.fields(changes.entries[::-1][last])
        stored = is_placed(kinds)
        offsets[~stored] = 0
        if stored.any():
            # Granted before it was published, so the barrier made the file this long.
            end = int(offsets.max()) + self._geometry.block_size
            self._referenced_end = max(self._referenced_end, end)
        # Bitmaps before the entries that make them count.
        self._commit_bitmaps(changes, blocks[kinds != plane.Kind.MIXED])
        values = bat.pack_entries(tags & np.uint64(7), offsets)
        anchors = self._commit_entries(blocks, values)
        with self._lock:
            self._space.assign(len(anchors))  # they were nobody's places until now
            self._space.release_after(changes.generation, anchors)
            self._space.committed(changes.generation)

    def _commit_bitmaps(self, changes: plane.Changes, others: npt.NDArray[np.uint64]) -> None:
        """Logs and applies the bitmaps of blocks that stay partially present."""
        if not len(changes.bitmap_pages):
            return
        wanted = ~np.isin(changes.bitmap_pages, others)
        blocks = changes.bitmap_pages[wanted]
        if not len(blocks):
            return
        order = np.argsort(blocks)
        blocks, bitmaps = blocks[order], changes.bitmaps[wanted][order]
        with self._lock:
            chunks = self._bitmaps.missing(blocks)
            places = self._place_bitmaps(len(chunks))
        if chunks:
            self._leaf.flush()  # the file's new length and the zeros in it
            positions = np.array([self._bitmaps.position(c) for c in chunks], np.uint64)
            states = np.full(len(chunks), bat.BitmapState.PRESENT, np.uint64)
            self._commit_sectors(positions, bat.pack_entries(states, np.array(places, np.uint64)))
            with self._lock:
                self._bitmaps.place(chunks, places)
        for offsets, pages in self._bitmaps.pages(blocks, bitmaps, self._journal.read):
            if len(offsets):
                self._journal.commit(offsets, pages, self._referenced_end)

    def _place_bitmaps(self, count: int) -> list[int]:
        """Places of 1 MiB that read zeros; from the ready blocks, so that none lie behind them."""
        assert self._space is not None
        if count > len(self._bitmap_stock):
            ready = self.map.revoke()
            self._space.give_back(ready)
            if len(ready):
                start = int(self._space.take(1)[0])
                self._space.assign(-1)
                self._bitmap_stock += range(start, start + self._geometry.block_size, MIB)
        places = [self._bitmap_stock.pop(0) for _ in range(min(count, len(self._bitmap_stock)))]
        places += [self._space.take_region(MIB) for _ in range(count - len(places))]
        if places:
            self._journal.forget()
            self._referenced_end = max(self._referenced_end, max(places) + MIB)
        return places

    def _commit_entries(
        self, blocks: npt.NDArray[np.uint64], values: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.uint64]:
        """Logs and applies BAT entries; returns the soft anchors that they replace."""
        positions = self.structure.bat.offset + self._geometry.indices(blocks) * np.uint64(8)
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
        contents = self._journal.read(offsets)
        table = contents.reshape(-1).view("<u8")
        slots = inverse * 512 + ((positions % np.uint64(4096)) // np.uint64(8)).astype(np.int64)
        old = table[slots].astype(np.uint64)
        states, anchors = bat.state_of(old), bat.offset_of(old)
        anchored = (states == BlockState.UNDEFINED) | (states == BlockState.UNMAPPED)
        table[slots] = values
        self._journal.commit(offsets, contents, self._referenced_end)
        # Only what was claimed when the image was opened: anything else may be another's by now.
        released = self._anchors.intersection(anchors[anchored].tolist())
        self._anchors -= released
        return np.array(sorted(released), np.uint64)

    # ---- changes of the structure ----

    @contextlib.contextmanager
    def changing(self) -> Iterator[plane.Device]:
        """Inside, metadata other than blocks may be changed: no commit runs. Gives the leaf."""
        self.open_gate()
        if self._frozen:
            raise ReadOnlyError("it is a checkpoint by now", path=self.host.path)
        with self._commit_lock:
            yield self._leaf

    def forget_log(self) -> None:
        """Begins a new log, so that earlier entries are never replayed; inside changing() only.

        Call it before logged pages of metadata are changed in place: a reader that replays more than
        the newest entry would undo that change. The caller has flushed: the file's size is durable.
        """
        with self._poisoning():
            self._journal.restart(self._referenced_end)

    @contextlib.contextmanager
    def _poisoning(self) -> Iterator[None]:
        """Poisons the map where what is inside fails so that the state of the log is not known."""
        try:
            yield
        except NoSpaceError:
            raise
        except BaseException:
            self.map.poison()
            raise

    def log(self, patches: list[tuple[int, bytes]]) -> None:
        """Changes these bytes of the file (offset, data) in one log entry; inside changing() only."""
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
        if len(pages) > journal.MOST_PAGES:
            raise InvalidArgumentError(f"{len(pages)} pages do not fit into a log entry")
        try:
            self._journal.commit(offsets, contents.reshape(-1, 4096), self._referenced_end)
        except BaseException:
            self.map.poison()  # the entry may be durable, and not applied
            raise

    def take_region(self, length: int, blocks: int = 0) -> int:
        """Space at the end of the file that reads zeros, durable after the next barrier; bytes.

        Args:
            length: a multiple of 1 MiB.
            blocks: payload blocks that will stand there.
        """
        assert self._space is not None
        with self._lock:
            start = self._space.take_region(length)
            self._space.assign(blocks)
            self._referenced_end = max(self._referenced_end, start + length)
        return start

    def release(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Frees blocks that no durable entry names any more."""
        assert self._space is not None
        with self._lock:
            self._space.release_after(0, offsets)

    def release_later(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Frees blocks as soon as what was published by now is durable."""
        assert self._space is not None
        generation = self.map.statistics()["dirty_generation"]
        with self._lock:
            self._space.release_after(generation, offsets)
            waiting = self._space.waiting
        most = max(_MOST_WAITING, self._geometry.virtual_size // 4)
        flush_soon(self.map, much=waiting * self._geometry.block_size > most)

    @property
    def has_released(self) -> bool:
        """Whether space waits for a commit to be given back."""
        if self._space is None:
            return False
        with self._lock:
            return self._space.waiting > 0

    def republish(self, page: int, old: np.uint64, new: npt.NDArray[np.uint64], offset: int) -> bool:
        """Publishes ``new`` where ``old`` stands, and frees its place; False where it does not."""
        one = np.array([page], np.uint64)
        before, after = np.array([old], np.uint64), np.array([new], np.uint64)
        done = not self.map.replace(one, before, after)[0]
        if done:
            self.release_later(np.array([offset], np.uint64))
        return done

    def entry_of(self, page: int) -> np.uint64:
        """The entry of a block, loaded if it was dropped."""
        while page < self._geometry.blocks:
            entry: np.uint64 = self.map.read_entries(page, 1)[0]
            if entry:
                return entry
            self.load(page, 1)
        return np.uint64(0)

    def take_back_grants(self) -> None:
        """Ready blocks that C has not used are free again."""
        assert self._space is not None
        with self._lock:
            self._space.give_back(self.map.revoke())

    def take_place_before(self, offset: int) -> int | None:
        """The first free block before ``offset``, zeroed or not; None where there is none."""
        assert self._space is not None
        with self._lock:
            return self._space.take_before(offset)

    def return_place(self, offset: int) -> None:
        """A place of :meth:`take_place_before` that was not used."""
        assert self._space is not None
        with self._lock:
            self._space.give_back(np.array([offset], np.uint64))

    def shorten(self) -> None:
        """Cuts off what nothing needs at the end of the file."""
        assert self._space is not None
        with self.changing() as leaf, self._lock:
            self._space.give_back(self.map.revoke())
            end = self._space.end
            if end < leaf.size:
                # A log that says the file was longer would be refused.
                self._referenced_end = end
                with self._poisoning():
                    self._journal.restart(end)
                leaf.resize(end)

    def adopt(self, geometry: bat.Geometry, table: region.Region) -> None:
        """The disk has this geometry from now on, and its BAT stands there."""
        with self._lock:
            old = self.structure
            self.structure = replace(
                old,
                geometry=geometry,
                bat=table,
                regions=tuple(table if r.guid == table.guid else r for r in old.regions),
                parameters=replace(old.parameters, virtual_size=geometry.virtual_size),
            )
            self._geometry = geometry
            self._journal.forget()
            self._bitmaps.adopt(self.structure)

    def forget(self, first: int, past: int) -> None:
        """The entries of these blocks, which the disk does not have any more, ask again."""
        for start in range(first, past, _RANGE_PAGES):
            pages = np.arange(start, min(start + _RANGE_PAGES, past), dtype=np.uint64)
            found = self.map.read_entries(start, len(pages))
            known = found != 0
            self.map.replace(
                pages[known], found[known], np.zeros(int(known.sum()), np.uint64), publish=False
            )

    # ---- the end ----

    def close(self) -> None:
        """Commits, stops the map, clears the log and lets go of the file.

        The file is closed in any case; the first failure is raised.
        """
        if self.map.state == plane.FORKED:
            self.host.close()  # the parent's locks may be held for ever here
            return
        poisoned = False
        try:
            if self._space is not None and self.map.state == 0:
                self.map.flush()
        finally:
            poisoned = self.map.state != 0
            with self._gate_lock:
                self._closed = True
            try:
                self.map.close()
            except PoisonedError:
                poisoned = True
            try:
                if self._space is not None and self._journal.is_open and not poisoned:
                    self._finish(self._space)
            finally:
                self.host.close()
        if poisoned and self._space is not None:
            raise PoisonedError(
                "an earlier flush or commit failed, so what was written since the last good one "
                "may be lost",
                path=self.host.path,
                hint="open it again and check what is there",
            )

    def freeze(self, path: str) -> None:
        """Ends all changes, with everything committed and the log cleared; reads go on.

        Nobody may be writing any more. The file is called ``path`` from now on.
        """
        with self._gate_lock, self._lock:
            self._frozen = True
        self.map.flush()
        self.map.freeze()
        with self._gate_lock:
            if self._space is not None and self._journal.is_open:
                self._finish(self._space)
        self.host.freeze(path)
        self.map.path = path

    def _finish(self, space: Space) -> None:
        with self._lock:
            space.committed(self.map.statistics()["committed_generation"])
            space.give_back(self.map.revoke())
            end = space.end
        self._journal.close(end)


def _united(
    firsts: npt.NDArray[np.uint64], lasts: npt.NDArray[np.uint64], block: int, size: int
) -> list[tuple[int, int]]:
    """Ranges of blocks as ranges of bytes inside a disk of ``size``; those that touch are one."""
    order = np.argsort(firsts, kind="stable")
    found: list[tuple[int, int]] = []
    for first, last in zip(firsts[order].tolist(), lasts[order].tolist(), strict=True):
        start, end = min(first * block, size), min(last * block, size)
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif start < end:
            found.append((start, end))
    return found
