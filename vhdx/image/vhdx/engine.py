# SPDX-License-Identifier: MIT
"""The VHDX engine: it answers the faults of an image's map.

Python decides where every block lives; C moves the bytes. The map has one page a payload block. An
entry's tag keeps the block's state, so the table can be turned back into BAT entries. The engine's
loader fills the map. An engine for writing has an allocator, which gives blocks their places, and a
committer, which makes changes durable.

Threads: faults come from any thread. ``_lock`` guards space and table residency; it is never held
across a barrier, but in :meth:`Engine.shorten`. ``_gate_lock`` makes the first change happen once;
commits are serialised by the map's rounds, and kept apart from other changes of metadata by
``_commit_lock``. Whoever moves or releases blocks other than by a commit holds ``structure_lock``.
Order: structure, commit, space.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import (
    ClosedError,
    PoisonedError,
    ReadOnlyError,
)
from vhdx.format.bat import BlockState
from vhdx.image.vhdx.allocation import Taken, survey
from vhdx.image.vhdx.allocator import Allocator
from vhdx.image.vhdx.bitmaps import SectorBitmaps
from vhdx.image.vhdx.committer import Committer
from vhdx.image.vhdx.entries import PARENT, hole_of, is_placed
from vhdx.image.vhdx.loader import Loader
from vhdx.image.vhdx.space import Space
from vhdx.units import TIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    import numpy.typing as npt

    from vhdx.format import bat, region
    from vhdx.format.header import Header
    from vhdx.image.host import HostFile
    from vhdx.image.vhdx.structure import Structure

__all__ = ["Engine"]

LARGEST_DISK = 64 * TIB
_SURVEY_ENTRIES = 1 << 17  # a table of up to 1 MiB is validated whole, also for reading
_RANGE_PAGES = 4096


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
        self._closed = False  # under the gate lock
        self._frozen = False  # under both locks; by a snapshot: faults that come late do nothing
        self._data_write_guid = data_write_guid
        self._furthest = 0
        self._bitmaps = SectorBitmaps(structure, host.leaf, host.path)
        self._allocator: Allocator | None = None
        self._committer: Committer | None = None
        taken = None
        if write or self._geometry.entries <= _SURVEY_ENTRIES:
            taken = survey(structure, self._leaf)
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
        self.loader = Loader(host, structure, self.map, self._bitmaps, self._lock)
        if write and taken is not None:
            try:
                self._prepare_changes(taken)
            except BaseException:
                self.map.close()
                raise

    def _prepare_changes(self, taken: Taken) -> None:
        sparse = self.host.sparse
        self._furthest = taken.furthest
        space = Space(self._leaf, taken, self._geometry.block_size, sparse=sparse)
        self._allocator = Allocator(space, self.map, self._geometry, self._lock, sparse=sparse)
        self._committer = Committer(
            self.structure,
            self._leaf,
            self.map,
            self._bitmaps,
            self._allocator,
            taken.anchors,
            self._lock,
        )

    @property
    def header(self) -> Header:
        """The current header."""
        if self._committer is None:
            return self.structure.header
        return self._committer.journal.header

    @property
    def allocator(self) -> Allocator:
        """Where blocks get their places.

        Raises:
            ReadOnlyError: the image is open for reading only.
        """
        if self._allocator is None:
            raise self._is_read_only()
        return self._allocator

    @property
    def committer(self) -> Committer:
        """What makes metadata durable.

        Raises:
            ReadOnlyError: the image is open for reading only.
        """
        if self._committer is None:
            raise self._is_read_only()
        return self._committer

    def _is_read_only(self) -> ReadOnlyError:
        return ReadOnlyError("it is open for reading only", path=self.host.path)

    # ---- faults ----

    def load(self, first: int, count: int) -> None:
        """Installs the entries of these blocks."""
        self.loader.load(first, count)

    def open_gate(self) -> None:
        """Headers and log before the first change ([MS-VHDX] 2.2.2)."""
        with self._gate_lock:
            if self._closed:
                raise ClosedError("the disk was closed", path=self.host.path)
            if self._frozen:
                return  # a snapshot was taken: the request comes back and goes to the child
            try:
                journal = self.committer.journal
                if not journal.is_open:
                    journal.open(self._leaf.size, self._data_write_guid)
                if self._furthest > self._leaf.size:
                    # The file ends inside its last block, as QEMU's fixed images do.
                    self._leaf.resize(self._furthest)
            except BaseException:
                # Which of its steps are durable is not known.
                self.map.poison()
                raise
            self.map.set_gate(is_open=True)

    def grant(self, wanted: int) -> None:
        """Hands ready blocks to C."""
        with self._lock:
            if self._closed and wanted:
                raise ClosedError("the disk was closed", path=self.host.path)
            if not self._closed and not self._frozen:
                self.allocator.grant(wanted)

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
            self.allocator.release_later(offsets[done])
        return pages[mismatched]

    def commit(self, changes: plane.Changes) -> None:
        """Writes sector bitmaps and BAT entries through the log; their data are durable."""
        with self._commit_lock:
            self.committer.commit(changes)

    # ---- changes of the structure ----

    @contextlib.contextmanager
    def changing(self) -> Iterator[plane.Device]:
        """Inside, metadata other than blocks may be changed: no commit runs. Gives the leaf."""
        self.open_gate()
        if self._frozen:
            raise ReadOnlyError("it is a checkpoint by now", path=self.host.path)
        with self._commit_lock:
            yield self._leaf

    def take_region(self, length: int, blocks: int = 0) -> int:
        """Space at the end of the file that reads zeros, durable after the next barrier; bytes.

        Args:
            length: a multiple of 1 MiB.
            blocks: payload blocks that will stand there.
        """
        start = self.allocator.take_region(length, blocks)
        self.committer.reach(start + length)
        return start

    @property
    def has_released(self) -> bool:
        """Whether space waits for a commit to be given back."""
        return self._allocator is not None and self._allocator.has_released

    def republish(self, page: int, old: np.uint64, new: npt.NDArray[np.uint64], offset: int) -> bool:
        """Publishes ``new`` where ``old`` stands, and frees its place; False where it does not."""
        one = np.array([page], np.uint64)
        before, after = np.array([old], np.uint64), np.array([new], np.uint64)
        done = not self.map.replace(one, before, after)[0]
        if done:
            self.allocator.release_later(np.array([offset], np.uint64))
        return done

    def shorten(self) -> None:
        """Cuts off what nothing needs at the end of the file."""
        with self.changing() as leaf, self._lock:  # or a grant would take what is cut off
            end = self.allocator.end()
            if end < leaf.size:
                # A log that says the file was longer would be refused.
                self.committer.restart(end)
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
            self._bitmaps.adopt(self.structure)
            self.loader.adopt(self.structure)
            self.allocator.adopt(geometry)
            self.committer.adopt(self.structure)

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
            if self._committer is not None and self.map.state == 0:
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
                if not poisoned:
                    self._finish()
            finally:
                self.host.close()
        if poisoned and self._committer is not None:
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
            self._finish()
        self.host.freeze(path)
        self.map.path = path

    def _finish(self) -> None:
        """Clears the log, where there is one."""
        if self._committer is not None and self._committer.journal.is_open:
            self._committer.journal.close(self.allocator.finish())
