# SPDX-License-Identifier: MIT
"""Free space of an image file: the source of grants to C, and the sink of released space.

Released space is free only when the BAT change that released it is durable. Otherwise a crash could
show one block's data in another. Reused space is zeroed before it is granted; the data barrier of
the commit that refers to it makes the zeros durable.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import NoSpaceError
from vhdx.units import MIB, round_up

if TYPE_CHECKING:
    import numpy.typing as npt

    from vhdx.image.vhdx.allocation import Taken
    from vhdx.place import ImageFile

__all__ = ["Reservation", "Space"]


class Reservation(NamedTuple):
    """Places that are handed out, and have to be made to read zeros.

    Attributes:
        offsets: of the places, bytes.
        is_fresh: whether they lie side by side at the end of the file; else they are reused.
    """

    offsets: npt.NDArray[np.uint64]
    is_fresh: bool


class Space:
    """Manages places of one block each.

    The caller serialises all calls but :meth:`prepare` and :meth:`trim`, which do the I/O.

    Args:
        file: where the places lie. Blocks are set aside in it, but not regions, so that the holes
            of a large BAT stay holes.
        taken: the parts of the file that are in use.
        block_size: bytes.
    """

    def __init__(self, file: ImageFile, taken: Taken, block_size: int) -> None:
        self._leaf, self._set_aside = file.leaf, file.set_aside
        self._sparse = file.sparse  # whether fresh space may stay unallocated until it is written
        self._block = block_size
        self._end = taken.end
        self._free: deque[int] = deque(taken.gaps(block_size).tolist())
        self._pending: deque[tuple[int, npt.NDArray[np.uint64]]] = deque()
        self._committed = 0
        self._in_use = taken.blocks
        self._growing = threading.Lock()  # a leaf: the file's size, which must never shrink here

    @property
    def end(self) -> int:
        """The first byte behind everything that was handed out and not given back."""
        return self._end

    @property
    def waiting(self) -> int:
        """Places that are free as soon as a commit is durable."""
        return sum(len(offsets) for _, offsets in self._pending)

    @property
    def kept(self) -> int:
        """Places that were handed out and are not waiting to be freed."""
        return self._in_use - self.waiting

    def reserve(self, count: int) -> Reservation:
        """Hands out up to ``count`` places (1 or more), which :meth:`prepare` makes read zeros."""
        if self._free:
            some = [self._free.popleft() for _ in range(min(count, len(self._free)))]
            self._in_use += len(some)
            return Reservation(np.array(some, np.uint64), is_fresh=False)
        start = round_up(self._end, MIB)
        self._end = start + count * self._block
        self._in_use += count
        offsets = start + np.arange(count, dtype=np.uint64) * np.uint64(self._block)
        return Reservation(offsets, is_fresh=True)

    def prepare(self, reservation: Reservation) -> None:
        """Makes reserved places read zeros; needs no lock.

        Raises:
            NoSpaceError, HostIOError: they do not; :meth:`cancel` the reservation.
        """
        if reservation.is_fresh:
            start, count = int(reservation.offsets[0]), len(reservation.offsets)
            self._extend(start, count * self._block)
            self._set_aside(start, count * self._block)
            return
        for offset in reservation.offsets.tolist():
            self._set_aside(offset, self._block)
            self._leaf.zero(offset, self._block)

    def cancel(self, reservation: Reservation) -> None:
        """Takes back places that could not be prepared, and the space that was set aside for them."""
        start = int(reservation.offsets[0])
        at_end = self._end == int(reservation.offsets[-1]) + self._block
        self.give_back(reservation.offsets)
        if reservation.is_fresh and at_end and not self._sparse and self._leaf.size > start:
            self._leaf.resize(max(start, self._end))

    def take(self, count: int) -> npt.NDArray[np.uint64]:
        """Offsets of up to ``count`` places (1 or more) that read zeros.

        Raises:
            NoSpaceError: the host has no space.
        """
        reservation = self.reserve(count)
        try:
            self.prepare(reservation)
        except BaseException:
            self.cancel(reservation)
            raise
        return reservation.offsets

    def take_region(self, length: int) -> int:
        """Offset of ``length`` bytes (a multiple of 1 MiB) at the end that read zeros.

        Raises:
            NoSpaceError: the host has no space.
        """
        start, size = round_up(self._end, MIB), self._leaf.size
        try:
            self._extend(start, length)
        except NoSpaceError:
            if not self._sparse and self._leaf.size > max(size, start):
                self._leaf.resize(max(size, start))
            raise
        self._end = start + length
        return start

    def _extend(self, start: int, length: int) -> None:
        with self._growing:
            size = self._leaf.size
            if size < start + length:
                self._leaf.resize(start + length)
        # Bytes that an earlier crash left past the end may have any value.
        if size > start:
            self._leaf.zero(start, min(size - start, length))
        if not self._sparse:
            self._leaf.zero(start, length, no_hole=True)

    def take_before(self, offset: int) -> int | None:
        """Takes the lowest free place, if it is before ``offset``; its data may be stale."""
        if not self._free or min(self._free) >= offset:
            return None
        found = min(self._free)
        self._free.remove(found)
        self._in_use += 1
        return found

    def assign(self, count: int) -> None:
        """Corrects the count of places in use.

        Positive: blocks got places outside of :meth:`take`. Negative: a taken place serves something
        else.
        """
        self._in_use += count

    def release_after(self, generation: int, offsets: npt.NDArray[np.uint64]) -> None:
        """These places are free as soon as ``generation`` is committed; see :meth:`take_released`."""
        if len(offsets):
            self._pending.append((generation, offsets))

    def take_released(self, generation: int = 0) -> npt.NDArray[np.uint64]:
        """Notes that ``generation`` is durable.

        Returns:
            The places that are free now: :meth:`trim` them, then :meth:`add_free`.
        """
        self._committed = max(self._committed, generation)
        ready = [offsets for wanted, offsets in self._pending if wanted <= self._committed]
        self._pending = deque(each for each in self._pending if each[0] > self._committed)
        return np.concatenate([np.empty(0, np.uint64), *ready])

    def trim(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Gives the space of free places back to the host; needs no lock."""
        self._leaf.batch(
            [plane.Step(plane.Operation.TRIM, offset, self._block) for offset in offsets.tolist()]
        )

    def add_free(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Places that were released may be handed out again."""
        self._free.extend(offsets.tolist())
        self._in_use -= len(offsets)

    def give_back(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Takes back places that were never used; free places at the end lower the end."""
        self._in_use -= len(offsets)
        free = sorted({*self._free, *offsets.tolist()})
        while free and free[-1] + self._block == self._end:
            self._end = free.pop()
        self._free = deque(free)
