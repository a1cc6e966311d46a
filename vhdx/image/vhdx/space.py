# SPDX-License-Identifier: MIT
"""Free space of an image file: the source of grants to C, and the sink of released space.

Released space is free only when the BAT change that released it is durable. Otherwise a crash could
show one block's data in another. Reused space is zeroed before it is granted; the data barrier of
the commit that refers to it makes the zeros durable.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import NoSpaceError
from vhdx.units import MIB, round_up

if TYPE_CHECKING:
    import numpy.typing as npt

    from vhdx.image.vhdx.allocation import Taken

__all__ = ["Space"]


class Space:
    """Manages places of one block each; the caller serialises the calls.

    Args:
        leaf: the file.
        taken: the parts of the file that are in use.
        block_size: bytes.
        sparse: whether fresh space may stay unallocated until it is written.
    """

    def __init__(self, leaf: plane.Device, taken: Taken, block_size: int, *, sparse: bool) -> None:
        self._leaf = leaf
        self._sparse = sparse
        self._block = block_size
        self._end = taken.end
        self._free: deque[int] = deque(taken.gaps(block_size).tolist())
        self._pending: deque[tuple[int, npt.NDArray[np.uint64]]] = deque()
        self._committed = 0
        self._in_use = taken.blocks

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

    def take(self, count: int) -> npt.NDArray[np.uint64]:
        """Offsets of up to ``count`` places (1 or more) that read zeros.

        Raises:
            NoSpaceError: the host has no space for a single one.
        """
        if self._free:
            some = [self._free.popleft() for _ in range(min(count, len(self._free)))]
            try:
                for offset in some:
                    self._leaf.zero(offset, self._block)
            except BaseException:
                self._free.extendleft(reversed(some))
                raise
            self._in_use += len(some)
            return np.array(some, np.uint64)
        start = round_up(self._end, MIB)
        while True:
            try:
                self._extend(start, count * self._block)
                break
            except NoSpaceError:
                if count == 1:
                    raise
                count //= 2
        self._end = start + count * self._block
        self._in_use += count
        return start + np.arange(count, dtype=np.uint64) * np.uint64(self._block)

    def take_region(self, length: int) -> int:
        """Offset of ``length`` bytes (a multiple of 1 MiB) at the end that read zeros.

        Raises:
            NoSpaceError: the host has no space.
        """
        start = round_up(self._end, MIB)
        self._extend(start, length)
        self._end = start + length
        return start

    def _extend(self, start: int, length: int) -> None:
        size = self._leaf.size
        # Bytes that an earlier crash left past the end may have any value.
        if size > start:
            self._leaf.zero(start, min(size - start, length))
        if size < start + length:
            self._leaf.resize(start + length)
        if not self._sparse:
            try:
                self._leaf.zero(start, length, no_hole=True)
            except NoSpaceError:
                self._leaf.resize(max(size, start))
                raise

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
        """These places are free as soon as ``generation`` is committed."""
        if len(offsets):
            self._pending.append((generation, offsets))
        if generation <= self._committed:
            self.committed(generation)

    def committed(self, generation: int) -> None:
        """Notes that ``generation`` is durable, and frees the places that waited for it."""
        self._committed = max(self._committed, generation)
        waiting = list(self._pending)
        self._pending.clear()
        for wanted, offsets in waiting:
            if wanted > self._committed:
                self._pending.append((wanted, offsets))
                continue
            self._leaf.batch(
                [plane.Step(plane.Operation.TRIM, offset, self._block) for offset in offsets.tolist()]
            )
            self._free.extend(offsets.tolist())
            self._in_use -= len(offsets)

    def give_back(self, offsets: npt.NDArray[np.uint64]) -> None:
        """Takes back places that were never used; free places at the end lower the end."""
        self._in_use -= len(offsets)
        free = sorted({*self._free, *offsets.tolist()})
        while free and free[-1] + self._block == self._end:
            self._end = free.pop()
        self._free = deque(free)
