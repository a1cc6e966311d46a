# SPDX-License-Identifier: MIT
"""Files of a volume as devices: page tables over the space, kept in the ledger of the pool."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import InvalidArgumentError
from vhdx.units import TIB, format_size
from vhdx.volume.state import PAGE, runs_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from vhdx.volume.state import Pages, VolumeState

__all__ = ["LARGEST_FILE", "VolumeFile"]

LARGEST_FILE = 65 * TIB
_GRANT = 64  # pages at a time, for writes into holes


class Owner(Protocol):
    """The volume of a file (:class:`vhdx.volume.volume.Volume`)."""

    lock: threading.RLock
    state: VolumeState
    pages: Pages
    device: plane.Device
    read_only: bool

    def path_of(self, number: int) -> str:
        """A path of a file, for messages."""

    def commit(self, payloads: Iterable[bytes], *, grows: bool = False) -> None:
        """Makes records durable, and applies them."""

    def take_zeroed(self, count: int, least: int) -> npt.NDArray[np.int64]:
        """Takes free pages and makes them read zeros."""


class _Device(plane.Map):
    """The page table of a file; a change of its size is its owner's."""

    def __init__(self, owner: VolumeFile, volume: Owner, size: int) -> None:
        super().__init__(
            owner,
            size,
            LARGEST_FILE,
            PAGE,
            [volume.device],
            pool=plane.shared_pool(plane.Level.VOLUME),
            read_only=volume.read_only,
            path=volume.path_of(owner.id),
        )
        self._owner = owner

    def resize(self, size: int) -> None:
        """Changes the size, durably."""
        self._owner.prepare_size(size)
        super().resize(size)


class VolumeFile:
    """An open file of a volume; answers the faults of its device (:class:`vhdx.plane.FaultHandler`).

    Attributes:
        id: of the file.
        device: reads and writes it.
    """

    def __init__(self, volume: Owner, number: int) -> None:
        self._volume, self.id = volume, number
        self._granted: set[int] = set()  # under the volume's lock
        self.device = _Device(self, volume, volume.state.files[number].size)

    # ---- faults ----

    def load(self, first: int, count: int) -> None:
        with self._volume.lock:
            places = self._volume.state.files[self.id].places(first, count)
        self.device.install(first, _entries(places))

    def grant(self, wanted: int) -> None:
        volume = self._volume
        with volume.lock:
            places = volume.take_zeroed(max(wanted, _GRANT), max(1, wanted))
            self._granted.update(places.tolist())
        self.device.grant(0, (places * PAGE).astype(np.uint64), 0)

    def open_gate(self) -> None:
        self.device.set_gate(is_open=True)

    def change_range(self, operation: plane.Operation, first: int, count: int, size: int) -> None:
        del operation, size  # pages that are given up read zeros
        self._give_up(first, count)

    def _give_up(self, first: int, count: int) -> None:
        """Makes pages holes; their places are free when a commit has made that durable."""
        step = 1 << 16
        for at in range(first, first + count, step):
            pages = np.arange(at, min(at + step, first + count), dtype=np.uint64)
            self.load(at, len(pages))
            old = self.device.read_entries(at, len(pages))
            kinds, _, _ = plane.fields(old)
            stored = kinds == plane.Kind.DATA
            if stored.any():
                hole = np.full(int(stored.sum()), _hole(), np.uint64)
                self.device.replace(pages[stored], old[stored], hole)

    def commit(self, changes: plane.Changes) -> None:
        volume = self._volume
        pages, last = np.unique(changes.pages[::-1], return_index=True)
        kinds, offsets, _ = plane.fields(changes.entries[::-1])
        all_places = np.where(
            kinds == plane.Kind.DATA, (offsets // np.uint64(PAGE)).astype(np.int64), -1
        )
        places = all_places[last]
        with volume.lock:
            state = volume.state.files[self.id]
            before = np.concatenate([state.places(int(page), 1) for page in pages])
            runs = runs_of(pages.astype(np.int64), places)
            volume.commit(list(volume.state.extents_records(self.id, runs)))
            # Places that the pages had before, or between this commit and the one before it.
            left = np.unique(np.concatenate([before, all_places]))
            left = left[(left >= 0) & ~np.isin(left, places)]
            volume.pages.give_back(left)
            self._granted.difference_update(all_places.tolist())

    # ---- what images ask ----

    def set_aside(self, offset: int, length: int) -> None:
        """Gives holes in the range places, so that writes there change no metadata; durable."""
        volume, first = self._volume, offset // PAGE
        count = -(-(offset + length) // PAGE) - first
        self.device.flush()  # what is recorded of these pages is what C has, unless a write comes now
        with volume.lock:
            places = volume.state.files[self.id].places(first, count)
            holes = np.flatnonzero(places < 0)
            if len(holes) == 0:
                return
            taken = volume.take_zeroed(len(holes), len(holes))
            runs = runs_of((holes + first).astype(np.int64), taken)
            try:
                volume.commit(list(volume.state.extents_records(self.id, runs)))
            except BaseException:
                volume.pages.give_back(taken)
                raise
            pages = (holes + first).astype(np.uint64)
            hole = np.full(len(pages), _hole(), np.uint64)
            self.device.install(first, _entries(places))
            # A page that was written since keeps its place; its commit gives back what is recorded
            # now. One that was written and given up since is committed again after that.
            facts = self.device.statistics()
            dirty = facts["dirty_generation"] != facts["committed_generation"]
            self.device.replace(pages, hole, _entries(taken), publish=dirty)

    def prepare_size(self, size: int) -> None:
        """Records a new size, durably; before a smaller one, what is cut off is given back."""
        volume, old = self._volume, self.device.size
        if size > LARGEST_FILE:
            raise InvalidArgumentError(
                f"a file of {size} bytes is too large", hint=f"at most {format_size(LARGEST_FILE)}"
            )
        if size < old:
            first, end = -(-size // PAGE), -(-old // PAGE)
            if size % PAGE:
                self.device.zero(size, min(old, first * PAGE) - size)
            self._give_up(first, end - first)
            self.device.flush()
        with volume.lock:
            state = volume.state.files[self.id]
            changed = type(state)(state.id, size, state.note)
            volume.commit([volume.state.file_record(changed)])

    def close(self) -> None:
        """Commits what is left, and gives unused grants back."""
        self.device.close()
        with self._volume.lock:
            rest = np.array(sorted(self._granted), np.int64)
            self._granted.clear()
            self._volume.pages.give_back(rest)


def _entries(places: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    stored = places >= 0
    kinds = np.where(stored, np.uint64(plane.Kind.DATA), np.uint64(plane.Kind.HOLE))
    return plane.entries(kinds, 0, np.where(stored, places * PAGE, 0), 0)


def _hole() -> np.uint64:
    return np.uint64(plane.entries(plane.Kind.HOLE, 0, 0, 0))
