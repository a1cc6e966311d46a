# SPDX-License-Identifier: MIT
"""The VHDX engine: the fault handler of an image's map.

Python decides where each block is stored; C moves the data. The map has one page for each payload
block. The tag of a map entry holds the block's state, so the map can be converted back into BAT
entries. The engine's loader fills the map. An engine for writing also has an allocator, which gives
blocks their places, and a committer, which makes changes durable.

Threads: faults come from any thread. ``_lock`` guards the space of the file and the set of resident
chunks. It is never held across a barrier, except in :meth:`Engine.shorten`. ``_granting`` is held
while space for new blocks is zeroed. ``_gate_lock`` makes the first change happen once. The map's
rounds serialise commits, and ``_commit_lock`` keeps commits apart from other changes of metadata. A
thread that moves or releases blocks outside a commit holds ``structure_lock``. Locks are taken in
this order: structure, gate, commit, granting, space.
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
    from vhdx.image.vhdx.structure import Structure
    from vhdx.place import ImageFile

__all__ = ["Engine"]

LARGEST_DISK = 64 * TIB
_SURVEY_ENTRIES = 1 << 17  # a BAT of up to 1 MiB is validated whole even for reading
_RANGE_PAGES = 4096


class Engine:
    """Fault handler of one open VHDX file.

    Args:
        host: the file; the engine takes ownership of it.
        structure: of the file.
        parent: device of the parent, for a differencing image.
        write: whether the image may be changed.
        pool: runs background work.
        data_write_guid: the DataWriteGuid that the first change sets; a new one when None.
        data: the device to read blocks from; the file when None.
    """

    def __init__(
        self,
        host: ImageFile,
        structure: Structure,
        parent: plane.Device | None,
        *,
        write: bool,
        pool: plane.Pool,
        data_write_guid: UUID | None = None,
        data: plane.Device | None = None,
    ) -> None:
        self.host = host
        self.structure = structure  # changed under _commit_lock and _lock
        self._leaf = host.leaf
        self._geometry = structure.geometry  # likewise
        self._lock = threading.Lock()
        self._gate_lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._granting = threading.Lock()
        self.structure_lock = threading.Lock()
        self._closed = False  # under _gate_lock
        self._frozen = False  # under _gate_lock, _granting and _lock; a snapshot ends all changes
        self._data_write_guid = data_write_guid  # used under _gate_lock
        self._furthest = 0  # used under _gate_lock
        self._bitmaps = SectorBitmaps(structure, host.leaf, host.path)  # under _lock
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
            commits_below=True,
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
        self._furthest = taken.furthest
        space, sparse = Space(self.host, taken, self._geometry.block_size), self.host.sparse
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
        """The allocator, which gives blocks their places.

        Raises:
            ReadOnlyError: the image is open for reading only.
        """
        if self._allocator is None:
            raise self._is_read_only()
        return self._allocator

    @property
    def committer(self) -> Committer:
        """The committer, which makes metadata durable.

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
        """Prepares headers and log for the first change ([MS-VHDX] 2.2.2)."""
        with self._gate_lock:
            if self._closed:
                raise ClosedError("the disk was closed", path=self.host.path)
            if self._frozen:
                return  # a snapshot was taken: the request is retried on the child
            try:
                journal = self.committer.journal
                if not journal.is_open:
                    journal.open(self._leaf.size, self._data_write_guid)
                if self._furthest > self._leaf.size:
                    # The file ends inside its last block, as QEMU's fixed images do.
                    self._leaf.resize(self._furthest)
            except BaseException:
                # It is unknown which steps are durable.
                self.map.poison()
                raise
            self.map.set_gate(is_open=True)

    def grant(self, wanted: int) -> None:
        """Hands ready blocks to C."""
        with self._granting:
            if self._closed and wanted:
                raise ClosedError("the disk was closed", path=self.host.path)
            if not self._closed and not self._frozen:
                self.allocator.grant(wanted)

    def change_range(self, operation: plane.Operation, first: int, count: int, size: int) -> None:
        """Makes whole blocks ZERO or UNMAPPED, and releases their space."""
        with self.structure_lock:
            if self._frozen:
                return  # a snapshot was taken: the request is retried on the child
            if (
                size != self._geometry.virtual_size
                and (first + count) * self.structure.geometry.block_size > size
            ):
                count -= 1  # the last block was partial then; a resize may have extended it
            # If the disk has shrunk meanwhile, it refuses the retried request.
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
        """Tries once; returns the pages that must be tried again."""
        low, high = int(pages[0]), int(pages[-1]) + 1
        found = self.map.read_entries(low, high - low)[(pages - np.uint64(low)).astype(np.int64)]
        kinds, offsets, _ = plane.fields(found)
        if (kinds == plane.Kind.ASK).any():
            self.load(low, high - low)
            return pages
        wanted = found != new_hole
        if state == BlockState.UNMAPPED:
            wanted &= kinds != plane.Kind.HOLE  # a hole stays as it is
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
        """Writes sector bitmaps and BAT entries through the log; their data is durable already."""
        with self._commit_lock:
            self.committer.commit(changes)

    # ---- changes of the structure ----

    @contextlib.contextmanager
    def changing(self) -> Iterator[plane.Device]:
        """Keeps commits out while the caller changes metadata; yields the leaf."""
        self.open_gate()
        if self._frozen:
            raise ReadOnlyError("it has become a checkpoint", path=self.host.path)
        with self._commit_lock:
            yield self._leaf

    def take_region(self, length: int, blocks: int = 0) -> int:
        """Offset of zeroed space at the end of the file, durable after the next barrier; bytes.

        Args:
            length: a multiple of 1 MiB.
            blocks: number of payload blocks that the space will hold.
        """
        start = self.allocator.take_region(length, blocks)
        self.committer.reach(start + length)
        return start

    @property
    def has_released(self) -> bool:
        """Whether released space becomes free at the next commit."""
        return self._allocator is not None and self._allocator.has_released

    def republish(self, page: int, old: np.uint64, new: npt.NDArray[np.uint64], offset: int) -> bool:
        """Replaces the entry ``old`` and releases its place; False if the entry has changed."""
        one = np.array([page], np.uint64)
        before, after = np.array([old], np.uint64), np.array([new], np.uint64)
        done = not self.map.replace(one, before, after)[0]
        if done:
            self.allocator.release_later(np.array([offset], np.uint64))
        return done

    def shorten(self) -> None:
        """Truncates the file behind the last byte in use."""
        with self.changing() as leaf, self._granting, self._lock:  # no grant takes the cut space
            end = self.allocator.end()
            if end < leaf.size:
                # Readers refuse a log that requires a longer file.
                self.committer.restart(end)
                leaf.resize(end)

    def adopt(self, geometry: bat.Geometry, table: region.Region) -> None:
        """Switches to a new geometry and BAT region."""
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
        """Commits, closes the map, clears the log and closes the file.

        The file is closed even after a failure.
        """
        if self.map.state == plane.FORKED:
            self.host.close()  # forked: locks of the parent process may never be freed here
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
                "an earlier flush or commit failed, so data written since the last successful one "
                "may be lost",
                path=self.host.path,
                hint="open it again and check what is there",
            )

    def freeze(self, path: str) -> None:
        """Commits everything, clears the log and refuses further changes; reads go on.

        No write may be in flight. The file's name is ``path`` from now on.
        """
        with self._gate_lock, self._granting, self._lock:  # a grant that began has ended
            self._frozen = True
        self.map.flush()
        self.map.freeze()
        with self._gate_lock:
            self._finish()
        self.host.freeze(path)
        self.map.path = path

    def _finish(self) -> None:
        """Clears the log if it is open, and truncates the file behind the last byte in use."""
        if self._committer is not None and self._committer.journal.is_open:
            self._committer.journal.close(self.allocator.finish())
