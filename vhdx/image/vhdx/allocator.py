# SPDX-License-Identifier: MIT
"""Gives blocks their places in a VHDX file: grants space ahead, and reuses released space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhdx.arrays import np
from vhdx.errors import NoSpaceError
from vhdx.format.bat import BlockState
from vhdx.image.reclaim import flush_soon
from vhdx.image.vhdx.entries import OWN
from vhdx.units import GIB, MIB

if TYPE_CHECKING:
    import threading

    import numpy.typing as npt

    from vhdx import plane
    from vhdx.format import bat
    from vhdx.image.vhdx.space import Space

__all__ = ["Allocator"]

_FIRST_GRANT, _LARGEST_GRANT = 64 * MIB, 4 * GIB
_MOST_WAITING = 64 * MIB  # bytes; with more released space, a commit is requested at once


class Allocator:
    """Allocates the space of a writable image.

    Args:
        space: of the file.
        device: the map that gets the grants.
        geometry: of the disk.
        sparse: whether space may be granted long before it is used.
        lock: guards the space. It is never held across a barrier, except in the last step of a
            compaction, nor while space is zeroed or trimmed, except for sector bitmaps and regions.
    """

    def __init__(
        self,
        space: Space,
        device: plane.Map,
        geometry: bat.Geometry,
        lock: threading.Lock,
        *,
        sparse: bool,
    ) -> None:
        self._space = space  # under the lock
        self._map = device
        self._geometry = geometry  # under the lock
        self._sparse = sparse
        self._lock = lock
        self._grant_bytes = _FIRST_GRANT  # under the lock
        self._bitmap_stock: list[int] = []  # under the lock

    # ---- the caller holds the lock ----

    def adopt(self, geometry: bat.Geometry) -> None:
        """Switches to a new geometry."""
        self._geometry = geometry

    def place_bitmaps(self, count: int) -> list[int]:
        """Offsets of zeroed 1 MiB places, from ready blocks so that none lie behind unused ones."""
        if count > len(self._bitmap_stock):
            ready = self._map.revoke()
            self._space.give_back(ready)
            if len(ready):
                start = int(self._space.take(1)[0])
                self._space.assign(-1)
                self._bitmap_stock += range(start, start + self._geometry.block_size, MIB)
        places = [self._bitmap_stock.pop(0) for _ in range(min(count, len(self._bitmap_stock)))]
        places += [self._space.take_region(MIB) for _ in range(count - len(places))]
        return places

    def end(self) -> int:
        """Takes ready blocks back; returns the offset behind the last byte in use."""
        self._space.give_back(self._map.revoke())
        return self._space.end

    # ---- these take the lock ----

    def grant(self, wanted: int) -> None:
        """Hands ready blocks to C: reused ones, zeroed, then fresh ones past the end.

        One thread at a time. The lock is not held while the blocks are made to read zeros.

        Args:
            wanted: blocks that a request waits for; 0 when the stock is refilled.

        Raises:
            NoSpaceError: a request waits, and the host has no space.
        """
        with self._lock:
            # Ahead of need, grant no more than the disk's unallocated blocks. So the file never
            # gets much longer than the disk.
            lacking = self._geometry.blocks - self._space.kept
            count = max(wanted, min(self._grant_bytes // self._geometry.block_size, lacking))
        while count > 0:
            with self._lock:
                reservation = self._space.reserve(count)
            try:
                self._space.prepare(reservation)
            except BaseException as error:
                with self._lock:
                    self._space.cancel(reservation)
                    self._grant_bytes = _FIRST_GRANT
                if not isinstance(error, NoSpaceError):
                    raise
                if len(reservation.offsets) == 1:
                    if wanted:
                        raise
                    return  # no request waits; the next one that needs space gets the error
                count = len(reservation.offsets) // 2
                continue
            with self._lock:
                larger = min(2 * self._grant_bytes, _LARGEST_GRANT)
                self._grant_bytes = larger if self._sparse else _FIRST_GRANT
                self._map.grant(OWN, reservation.offsets, BlockState.FULLY_PRESENT)
            return

    def finish(self) -> int:
        """Like :meth:`end`, once every published entry is committed."""
        self._free_released(self._map.statistics()["committed_generation"])
        with self._lock:
            return self.end()

    def settle(self, generation: int, anchors: npt.NDArray[np.uint64]) -> None:
        """Notes that a commit is durable, and frees the soft anchors that it replaced."""
        with self._lock:
            self._space.assign(len(anchors))
            self._space.release_after(generation, anchors)
        self._free_released(generation)

    def _free_released(self, generation: int = 0) -> None:
        """Frees the places that wait for this generation, or for one that is durable already."""
        with self._lock:
            ready = self._space.take_released(generation)
        if len(ready):
            self._space.trim(ready)
            with self._lock:
                self._space.add_free(ready)

    def take_region(self, length: int, blocks: int = 0) -> int:
        """Offset of zeroed space at the end of the file, bytes.

        Args:
            length: a multiple of 1 MiB.
            blocks: number of payload blocks that the space will hold.
        """
        with self._lock:
            start = self._space.take_region(length)
            self._space.assign(blocks)
        return start

    def release(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Frees places that no durable entry refers to."""
        with self._lock:
            self._space.release_after(0, offsets)
        self._free_released()

    def release_later(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Frees places as soon as all entries published so far are durable."""
        generation = self._map.statistics()["dirty_generation"]
        with self._lock:
            self._space.release_after(generation, offsets)
        self._free_released()
        with self._lock:
            waiting = self._space.waiting
        most = max(_MOST_WAITING, self._geometry.virtual_size // 4)
        flush_soon(self._map, much=waiting * self._geometry.block_size > most)

    @property
    def has_released(self) -> bool:
        """Whether released space becomes free at the next commit."""
        with self._lock:
            return self._space.waiting > 0

    def take_back_grants(self) -> None:
        """Takes back the ready blocks that C has not used."""
        with self._lock:
            self.end()

    def take_place_before(self, offset: int) -> int | None:
        """Takes the lowest free place before ``offset``, if any; its data may be stale."""
        with self._lock:
            return self._space.take_before(offset)

    def return_place(self, offset: int) -> None:
        """Returns an unused place from :meth:`take_place_before`."""
        with self._lock:
            self._space.give_back(np.array([offset], np.uint64))
