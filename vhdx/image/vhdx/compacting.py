# SPDX-License-Identifier: MIT
"""Compacts an open VHDX image: releases zero blocks, moves blocks down, truncates the file.

Works while the disk is in use. A block is *shared* while it is moved or checked for release. Reads
of a shared block go on. A write to it first takes a new place, and then the old place is released.
A partially present block is not shared: requests are paused while it moves. The new place of a
moved block is written before its entry is published. An ordinary commit makes the entry durable,
and only then is the old place free. So a crash at any moment is safe.

Sector bitmap blocks, the BAT, metadata and log stay where they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import ReadOnlyError, Reason, VhdxError
from vhdx.format.bat import BlockState
from vhdx.image.contract import Compacted
from vhdx.image.vhdx.entries import is_placed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from vhdx.image.vhdx.engine import Engine
    from vhdx.interrupts import Progress

    Cancel = Callable[[], bool]
    Pace = Callable[[int], None]

__all__ = ["Compacted", "compact"]

_PIECE = 4 << 20
_MOVES_PER_COMMIT = 64
_SCAN = 512
_PROBE = 4096


def compact(
    engine: Engine,
    switch: plane.Switch,
    progress: Progress | None,
    cancel: Cancel | None,
    pace: Pace | None,
) -> Compacted:
    """Compacts the image of ``engine``, whose map is below ``switch``.

    Raises:
        ReadOnlyError: it is open for reading only.
        VhdxError: reason CANCELLED; the work done so far stays.
    """
    if engine.host.read_only:
        raise ReadOnlyError("it is open for reading only", path=engine.host.path)
    work = _Compaction(engine, switch, progress, cancel, pace)
    done = Compacted(engine.host.leaf.size, allocated_before=engine.host.allocated())
    engine.map.flush()
    parameters = engine.structure.parameters
    if parameters.has_parent or not parameters.leave_blocks_allocated:
        engine.open_gate()
        done.zeroed = work.give_up_zeros()
        engine.map.flush()
        done.moved = work.move_down()
        engine.map.flush()
        engine.shorten()
    work.finish()
    done.file_size_after, done.allocated_after = engine.host.leaf.size, engine.host.allocated()
    return done


class _Compaction:
    def __init__(
        self,
        engine: Engine,
        switch: plane.Switch,
        progress: Progress | None,
        cancel: Cancel | None,
        pace: Pace | None,
    ) -> None:
        self._engine, self._switch = engine, switch
        self._leaf, self._map = engine.host.leaf, engine.map
        self._block = engine.structure.geometry.block_size
        self._progress, self._cancel, self._pace = progress, cancel, pace
        self._total = 1
        self._buffer = bytearray(min(_PIECE, self._block))

    def finish(self) -> None:
        """Reports full progress."""
        if self._progress is not None:
            self._progress(self._total, self._total)

    def _step(self, done: int, total: int, size: int) -> None:
        """Checks for cancellation, reports progress, paces ``size`` bytes of I/O; holds no lock."""
        self._total = total
        if self._cancel is not None and self._cancel():
            raise VhdxError(
                "the compaction was stopped; what it did stays",
                reason=Reason.CANCELLED,
                path=self._engine.host.path,
            )
        if self._progress is not None:
            self._progress(done, total)
        if self._pace is not None:
            self._pace(size)

    def _loaded(self) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]:
        """Yields pages and entries of stored blocks, in batches."""
        for first in range(0, self._engine.structure.geometry.blocks, _SCAN):
            count = min(_SCAN, self._engine.structure.geometry.blocks - first)
            if count <= 0:
                return  # the disk has shrunk
            self._engine.loader.entry_of(first)  # loads the chunk around it
            entries = self._map.read_entries(first, count)
            kinds, _, _ = plane.fields(entries)
            placed = is_placed(kinds)
            pages = np.arange(first, first + count, dtype=np.uint64)
            yield pages[placed], entries[placed]

    # ---- zeros ----

    def give_up_zeros(self) -> int:
        """Makes blocks that hold only zeros ZERO; returns their number."""
        found, total = 0, self._engine.structure.geometry.virtual_size
        for pages, entries in self._loaded():
            kinds, offsets, _ = plane.fields(entries)
            for page, entry, kind, offset in zip(
                pages.tolist(), entries, kinds.tolist(), offsets.tolist(), strict=True
            ):
                if kind == plane.Kind.DATA and self._is_zero(offset):
                    found += self._give_up(page, entry, offset)
                self._step(page * self._block, 2 * total, _PROBE)
        return found

    def _is_zero(self, offset: int) -> bool:
        for extent in self._leaf.extents(offset, min(self._block, self._leaf.size - offset)):
            if extent.state != plane.DATA:
                continue
            at, end, piece = extent.offset, extent.offset + extent.length, _PROBE
            while at < end:  # most blocks have data at their beginning
                part = min(piece, end - at)
                view = memoryview(self._buffer)[:part]
                self._leaf.read_into(view, at)
                if np.frombuffer(view, np.uint64 if part % 8 == 0 else np.uint8).any():
                    return False
                at, piece = at + part, len(self._buffer)
        return True

    def _give_up(self, page: int, entry: np.uint64, offset: int) -> bool:
        hole = plane.entries(plane.Kind.HOLE, 0, 0, BlockState.ZERO | plane.TAG_ZERO)
        with self._engine.structure_lock, _Shared(self._engine, page, entry) as shared:
            # No write can change the block in place now: check it again.
            return shared.held and self._is_zero(offset) and shared.become(hole)

    # ---- moves ----

    def move_down(self) -> int:
        """Moves blocks from the end of the file into free places before them; returns how many."""
        self._engine.allocator.take_back_grants()
        where = sorted(
            (
                (offset, page)
                for pages, entries in self._loaded()
                for page, offset in zip(
                    pages.tolist(), plane.fields(entries)[1].tolist(), strict=True
                )
            ),
            reverse=True,
        )
        moved = 0
        for number, (offset, page) in enumerate(where):
            # The second half of the progress; the search for zeros was the first.
            total = self._engine.structure.geometry.virtual_size
            self._step(total + total * number // len(where), 2 * total, self._block)
            with self._engine.structure_lock:
                target = self._engine.allocator.take_place_before(offset)
                if target is None:
                    return moved
                entry = self._engine.loader.entry_of(page)
                moved += self._move(page, entry, offset, target)
            if number % _MOVES_PER_COMMIT == _MOVES_PER_COMMIT - 1:
                self._map.flush()
        return moved

    def _move(self, page: int, entry: np.uint64, offset: int, target: int) -> bool:
        kind, now, tag = (int(v[0]) for v in plane.fields(np.array([entry], np.uint64)))
        if now != offset or kind not in {plane.Kind.DATA, plane.Kind.MIXED}:
            self._engine.allocator.return_place(target)
            return False
        new = plane.entries(kind, 0, target, tag)
        if kind == plane.Kind.MIXED:
            # Its sectors change in place, so no write may run meanwhile.
            with self._switch.paused():
                self._copy(offset, target)
                done = self._engine.republish(page, entry, new, offset)
            if not done:
                self._engine.allocator.return_place(target)
            return done
        with _Shared(self._engine, page, entry) as shared:
            if shared.held:
                self._copy(offset, target)
                if shared.become(new):
                    return True
        self._engine.allocator.return_place(target)
        return False

    def _copy(self, source: int, target: int) -> None:
        """Copies allocated extents; zeroes the rest of the target, which may hold stale data."""
        end = min(self._block, self._leaf.size - source)
        self._leaf.zero(target, self._block)
        for extent in self._leaf.extents(source, end):
            if extent.state != plane.DATA:
                continue
            stop = min(extent.offset + extent.length, source + end)
            for at in range(extent.offset, stop, len(self._buffer)):
                view = memoryview(self._buffer)[: min(len(self._buffer), stop - at)]
                self._leaf.read_into(view, at)
                self._leaf.write(view, target + at - source)


class _Shared:
    """Context in which no write changes a block in place.

    Attributes:
        held: whether the entry was still current at the start.
    """

    def __init__(self, engine: Engine, page: int, entry: np.uint64) -> None:
        self._engine, self._page, self._entry = engine, page, entry
        _, offset, tag = plane.fields(np.array([entry], np.uint64))
        self._offset = int(offset[0])
        self._shared = plane.entries(plane.Kind.SHARED, 0, offset[0], tag[0])
        self._settled = False
        self.held = False

    def __enter__(self) -> _Shared:
        self.held = self._replace(self._entry, self._shared, publish=False)
        self._settled = not self.held
        return self

    def become(self, new: npt.NDArray[np.uint64]) -> bool:
        """Publishes ``new`` and releases the old place; False if a write came first."""
        done = self._replace(self._shared, new, publish=True)
        if done:
            self._release()
            self._settled = True
        return done

    def __exit__(self, *_: object) -> None:
        if self._settled:
            return
        if not self._replace(self._shared, self._entry, publish=False):
            now = plane.fields(np.array([self._engine.loader.entry_of(self._page)], np.uint64))[1]
            if int(now[0]) != self._offset:
                # A write took a new place; reads of the old place may be in flight.
                self._engine.map.quiesce()
                self._release()

    def _release(self) -> None:
        self._engine.allocator.release_later(np.array([self._offset], np.uint64))

    def _replace(self, old: object, new: object, *, publish: bool) -> bool:
        one = np.array([self._page], np.uint64)
        before, after = np.array([old], np.uint64), np.array([new], np.uint64)
        return not self._engine.map.replace(one, before, after, publish=publish)[0]
