# SPDX-License-Identifier: MIT
"""Gives blocks their places in a VHDX file: grants ahead, and space that comes back."""

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
_MOST_WAITING = 64 * MIB  # of released space, before a commit is asked for at once


class Allocator:
    """The space of an image that may be changed.

    Args:
        space: of the file.
        device: the map that gets the grants.
        geometry: of the disk.
        sparse: whether space may be granted long before it is used.
        lock: guards the space. It is never held across a barrier, but in a compaction's last step.
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
        self._space = space
        self._map = device
        self._geometry = geometry
        self._sparse = sparse
        self._lock = lock
        self._grant_bytes = _FIRST_GRANT  # under the lock
        self._bitmap_stock: list[int] = []  # under the lock

    # ---- the caller holds the lock ----

    def adopt(self, geometry: bat.Geometry) -> None:
        """The disk has this geometry from now on."""
        self._geometry = geometry

    def grant(self, wanted: int) -> None:
        """Hands ready blocks to C: reused ones, zeroed, then fresh ones past the end."""
        # Ahead only as many as the disk lacks, so that its file never gets much longer than it.
        lacking = self._geometry.blocks - self._space.kept
        count = max(wanted, min(self._grant_bytes // self._geometry.block_size, lacking))
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
        if not self._sparse:
            self._grant_bytes = _FIRST_GRANT
        self._map.grant(OWN, offsets, BlockState.FULLY_PRESENT)

    def place_bitmaps(self, count: int) -> list[int]:
        """Places of 1 MiB that read zeros; from the ready blocks, so that none lie behind them."""
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
        """Takes ready blocks back; the first byte of the file behind everything that is needed."""
        self._space.give_back(self._map.revoke())
        return self._space.end

    # ---- these take the lock ----

    def finish(self) -> int:
        """As :meth:`end`, when everything that was published is committed."""
        with self._lock:
            self._space.committed(self._map.statistics()["committed_generation"])
            return self.end()

    def settle(self, generation: int, anchors: npt.NDArray[np.uint64]) -> None:
        """A commit is durable. Its soft anchors, which were nobody's places until now, are free."""
        with self._lock:
            self._space.assign(len(anchors))
            self._space.release_after(generation, anchors)
            self._space.committed(generation)

    def take_region(self, length: int, blocks: int = 0) -> int:
        """Space at the end of the file that reads zeros; bytes.

        Args:
            length: a multiple of 1 MiB.
            blocks: payload blocks that will stand there.
        """
        with self._lock:
            start = self._space.take_region(length)
            self._space.assign(blocks)
        return start

    def release(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Frees blocks that no durable entry names any more."""
        with self._lock:
            self._space.release_after(0, offsets)

    def release_later(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Frees blocks as soon as what was published by now is durable."""
        generation = self._map.statistics()["dirty_generation"]
        with self._lock:
            self._space.release_after(generation, offsets)
            waiting = self._space.waiting
        most = max(_MOST_WAITING, self._geometry.virtual_size // 4)
        flush_soon(self._map, much=waiting * self._geometry.block_size > most)

    @property
    def has_released(self) -> bool:
        """Whether space waits for a commit to be given back."""
        with self._lock:
            return self._space.waiting > 0

    def take_back_grants(self) -> None:
        """Ready blocks that C has not used are free again."""
        with self._lock:
            self.end()

    def take_place_before(self, offset: int) -> int | None:
        """The first free block before ``offset``, zeroed or not; None where there is none."""
        with self._lock:
            return self._space.take_before(offset)

    def return_place(self, offset: int) -> None:
        """A place of :meth:`take_place_before` that was not used."""
        with self._lock:
            self._space.give_back(np.array([offset], np.uint64))
