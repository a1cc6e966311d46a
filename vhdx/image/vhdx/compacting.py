# SPDX-License-Identifier: MIT
"""Compacts an open VHDX image: releases zero blocks, moves blocks down, truncates the file.

Works while the disk is in use. Reads and writes do not wait for it; a trim of whole blocks waits
while one block is copied. A block is copied while it may be
written, and the map notes which parts of it are changed meanwhile; those are copied again. Then the
entry of the block is *watched*: the first write clears that mark. The last parts are copied, and the
entry is replaced only if it still has the mark. So the copy is complete when it becomes the block,
and a write never waits for a copy. A block that is written too often stays where it is.

The new place of a moved block is written before its entry is published. An ordinary commit makes the
entry durable, and only then is the old place free. So a crash at any moment is safe.

Sector bitmap blocks, the BAT, metadata and log stay where they are.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import ReadOnlyError, Reason, VhdxError
from vhdx.format.bat import BlockState
from vhdx.image.contract import Compacted
from vhdx.image.vhdx.entries import is_placed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy.typing as npt

    from vhdx.image.vhdx.engine import Engine
    from vhdx.interrupts import Progress

    Cancel = Callable[[], bool]
    Pace = Callable[[int], None]

__all__ = ["Compacted", "compact"]

_PIECE = 4 << 20  # bytes that are copied at a time
_SHORT_PIECE, _REST = 32 << 10, 50e-6  # beside a client: bytes, and seconds of rest after each piece
_MOVES_PER_COMMIT = 64
_SCAN = 512
_PROBE = 4096
_MOST_TRIES = 16  # to publish the copy of a block that is written
_FEW_PARTS = 4  # that are copied while a block is watched


def compact(
    engine: Engine,
    progress: Progress | None,
    cancel: Cancel | None,
    pace: Pace | None,
) -> Compacted:
    """Compacts the image of ``engine``.

    Raises:
        ReadOnlyError: it is open for reading only.
        VhdxError: reason CANCELLED; the work done so far stays.
    """
    if engine.host.read_only:
        raise ReadOnlyError("it is open for reading only", path=engine.host.path)
    work = _Compaction(engine, progress, cancel, pace)
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
        progress: Progress | None,
        cancel: Cancel | None,
        pace: Pace | None,
    ) -> None:
        self._engine = engine
        self._leaf, self._map = engine.host.leaf, engine.map
        self._block = engine.structure.geometry.block_size
        self._progress, self._cancel, self._pace = progress, cancel, pace
        self._total = 1
        # A kernel that lets a thread finish its time slice makes clients wait for milliseconds, so
        # beside clients the compaction gives up the processor often.
        self._rests = pace is not None
        piece = _SHORT_PIECE if self._rests else _PIECE
        self._buffer = bytearray(min(piece, self._block))

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

    def _rest(self) -> None:
        if self._rests:
            time.sleep(_REST)

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
                self._rest()
                if np.frombuffer(view, np.uint64 if part % 8 == 0 else np.uint8).any():
                    return False
                at, piece = at + part, len(self._buffer)
        return True

    def _give_up(self, page: int, entry: np.uint64, offset: int) -> bool:
        hole = plane.entries(plane.Kind.HOLE, 0, 0, BlockState.ZERO | plane.TAG_ZERO)
        with self._engine.structure_lock, _Watch(self._engine, page, entry) as watch:
            # A write from now on is noticed: check again.
            return watch.begin() and self._is_zero(offset) and watch.end(hole, offset)

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
                self._rest()
                self._map.flush()
            self._rest()
        return moved

    def _move(self, page: int, entry: np.uint64, offset: int, target: int) -> bool:
        kind, now, tag = (int(v[0]) for v in plane.fields(np.array([entry], np.uint64)))
        if now != offset or kind not in {plane.Kind.DATA, plane.Kind.MIXED}:
            self._engine.allocator.return_place(target)
            return False
        new = plane.entries(kind, 0, target, tag)
        published: bool | None = False  # None: unknown, so the place must not be used again
        try:
            with (
                self._map.tracking(page) as take_changes,
                _Watch(self._engine, page, entry) as watch,
            ):
                self._rest()
                self._copy(offset, target)
                changes = take_changes()
                self._rest()
                for _ in range(_MOST_TRIES):
                    if len(changes) > _FEW_PARTS:
                        self._copy_parts(changes, offset, target)
                        changes = take_changes()
                    if not watch.begin():
                        break  # the block was given up meanwhile
                    self._copy_parts(changes + take_changes(), offset, target)
                    self._rest()
                    published = None
                    published = watch.end(new, offset)
                    self._rest()
                    if published:
                        break
                    changes = take_changes()
        finally:
            if published is False:
                self._engine.allocator.return_place(target)
        return bool(published)

    def _copy_parts(self, parts: Iterable[int], source: int, target: int) -> None:
        """Copies these 64ths of a block."""
        size = self._block // 64
        for part in sorted(set(parts)):
            end = min(source + (part + 1) * size, self._leaf.size)
            self._copy_range(source + part * size, end, target + part * size)

    def _copy_range(self, start: int, end: int, target: int) -> None:
        for at in range(start, end, len(self._buffer)):
            view = memoryview(self._buffer)[: min(len(self._buffer), end - at)]
            self._leaf.read_into(view, at)
            self._leaf.write(view, target + at - start)
            self._rest()

    def _copy(self, source: int, target: int) -> None:
        """Copies allocated extents; zeroes the rest of the target, which may hold stale data."""
        end, done = min(self._block, self._leaf.size - source), 0
        for extent in self._leaf.extents(source, end):
            if extent.state != plane.DATA:
                continue
            at, stop = extent.offset - source, min(extent.offset + extent.length - source, end)
            if at > done:
                self._leaf.zero(target + done, at - done)
            self._copy_range(extent.offset, source + stop, target + at)
            done = max(done, stop)
        if done < self._block:
            self._leaf.zero(target + done, self._block - done)


class _Watch:
    """Context in which a change of a block's entry or content can be noticed."""

    def __init__(self, engine: Engine, page: int, entry: np.uint64) -> None:
        self._engine, self._page = engine, page
        self._entry, self._watched = entry, entry | np.uint64(plane.WATCHED)

    def begin(self) -> bool:
        """Watches the block; False if its entry is not the one that it had. Ends older writes."""
        return self._replace(self._entry, self._watched)

    def end(self, new: npt.NDArray[np.uint64], offset: int) -> bool:
        """Publishes ``new`` and releases the old place; False if the block was written."""
        return self._engine.republish(self._page, self._watched, new, offset)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._replace(self._watched, self._entry)  # no effect unless it is still watched

    def _replace(self, old: np.uint64, new: np.uint64) -> bool:
        one = np.array([self._page], np.uint64)
        before, after = np.array([old], np.uint64), np.array([new], np.uint64)
        return not self._engine.map.replace(one, before, after, publish=False)[0]
