# SPDX-License-Identifier: MIT
"""Page tables from Python: entries are passed to C as numpy arrays, and C reports faults."""

from __future__ import annotations

import contextlib
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vhdx.arrays import np
from vhdx.errors import ClosedError
from vhdx.plane import failures, gil
from vhdx.plane._native import ffi, lib
from vhdx.plane.callback import upcalls
from vhdx.plane.device import Device, Operation, Pool, taking_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

__all__ = [
    "CHUNK_PAGES",
    "TAG_ZERO",
    "WATCHED",
    "Accesses",
    "Changes",
    "FaultHandler",
    "Kind",
    "Map",
    "Sectors",
    "entries",
    "fields",
]

CHUNK_PAGES: int = lib.VX_CHUNK_PAGES
"""Pages whose entries are dropped together (``VX_CHUNK_PAGES``)."""

WATCHED: int = lib.VX_ENTRY_WATCHED
"""Bit of an entry whose page somebody copies; the first change of the page clears it."""

TAG_ZERO: int = lib.VX_TAG_ZERO
"""Bit of a tag: a hole that is reported as zeros rather than as unallocated."""


class Kind(IntEnum):
    """Kinds of entries (``csrc/core/table.h``)."""

    ASK = lib.VX_ASK
    HOLE = lib.VX_HOLE
    DATA = lib.VX_DATA
    SHARED = lib.VX_SHARED
    MIXED = lib.VX_MIXED


def entries(
    kind: npt.ArrayLike, lower: npt.ArrayLike, offset: npt.ArrayLike, tag: npt.ArrayLike
) -> npt.NDArray[np.uint64]:
    """Entries of kind, lower device, offset (bytes, a multiple of 512) and tag (0..511)."""
    result: npt.NDArray[np.uint64] = (
        (np.asarray(offset, np.uint64) >> np.uint64(9))
        | (np.asarray(lower, np.uint64) << np.uint64(lib.VX_ENTRY_LOWER_SHIFT))
        | (np.asarray(kind, np.uint64) << np.uint64(lib.VX_ENTRY_KIND_SHIFT))
        | (np.asarray(tag, np.uint64) << np.uint64(lib.VX_ENTRY_TAG_SHIFT))
    )
    return result


def fields(
    entry: npt.NDArray[np.uint64],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Kind, offset (bytes) and tag of entries."""
    kind = (entry >> np.uint64(lib.VX_ENTRY_KIND_SHIFT)) & np.uint64(7)
    offset = (entry & np.uint64(0x7FFFFFFFFF)) << np.uint64(9)
    return kind, offset, entry >> np.uint64(lib.VX_ENTRY_TAG_SHIFT)


class Changes(NamedTuple):
    """The changes that a commit makes durable; the data that they point to is already durable.

    Attributes:
        pages: published pages, oldest first; a page may occur more than once.
        entries: the entries of these pages.
        bitmap_pages: pages whose sector bitmaps changed.
        bitmaps: one row of bitmap bytes for each of ``bitmap_pages``.
        generation: the generation that is durable after the commit.
    """

    pages: npt.NDArray[np.uint64]
    entries: npt.NDArray[np.uint64]
    bitmap_pages: npt.NDArray[np.uint64]
    bitmaps: npt.NDArray[np.uint8]
    generation: int


class Sectors(NamedTuple):
    """How writes move pages from the parent to this device, sector by sector.

    Attributes:
        size: bytes of a sector, 512 or 4096.
        mixed_tag: the tag of entries with a sector bitmap.
        full_tag: the tag of entries whose sectors are all stored in this device.
    """

    size: int
    mixed_tag: int
    full_tag: int


class Accesses(NamedTuple):
    """Accesses of pages since they were last taken; each count stays at 65,535.

    A request is sequential if it has more than 64 KiB or goes on where its client's last one ended.
    """

    random_reads: npt.NDArray[np.uint16]
    random_writes: npt.NDArray[np.uint16]
    sequential_reads: npt.NDArray[np.uint16]
    sequential_writes: npt.NDArray[np.uint16]


class FaultHandler(Protocol):
    """Decides where the pages of a map are stored; called from any thread, with no lock held.

    A :class:`vhdx.errors.VhdxError` of a declared kind refuses the request; any other exception
    poisons the map.
    """

    def load(self, first: int, count: int) -> None:
        """Installs the entries of these pages."""

    def grant(self, wanted: int) -> None:
        """Grants ready pages to the map; ``wanted`` is 0 when no request waits for a page."""

    def open_gate(self) -> None:
        """Prepares for the first change, then opens the map's gate."""

    def change_range(self, operation: Operation, first: int, count: int, size: int) -> None:
        """Zeroes or trims whole pages; the last page of a device of ``size`` may be partial."""

    def commit(self, changes: Changes) -> None:
        """Makes entries and sector bitmaps durable."""


_NO_PAGE = (1 << 64) - 1


def _copy(memory: Any, length: int) -> bytes:
    return bytes(ffi.buffer(memory, length)) if length else b""


class Map(Device):
    """A device whose pages are stored on lower devices (``csrc/map/map.h``).

    Args:
        handler: answers the faults. This object keeps the handler, but nothing keeps this object:
            its owner must hold a reference to it.
        size: bytes.
        largest_size: the largest size in bytes that the device can be resized to.
        page_size: bytes, a power of two from 512 to 4 GiB.
        lowers: the lower devices, by index; None: one that may join later.
        parent: index of the lower device that mixed pages fall back to.
        sectors: the sectors of mixed pages; needed with a parent.
        in_place: zero writes zeros and keeps the space; trim does nothing.
        transparent: zero, trim and extents are passed to the lower device.
        identity_placed: page p gets its space at the same offset of lower device 0; no grants.
        commits_below: a commit writes to the one writable lower device, and makes a barrier there.
        read_only: refuse changes.
        gated: fault before the first change.
        pool: runs refills and commits in the background.
        path: the name in errors.
    """

    def __init__(
        self,
        handler: FaultHandler,
        size: int,
        largest_size: int,
        page_size: int,
        lowers: Sequence[Device | None],
        *,
        parent: int | None = None,
        sectors: Sectors | None = None,
        in_place: bool = False,
        transparent: bool = False,
        identity_placed: bool = False,
        commits_below: bool = False,
        read_only: bool = False,
        gated: bool = False,
        pool: Pool,
        path: str | None = None,
    ) -> None:
        np.uint64  # noqa: B018 - faults need numpy; fail here if it cannot be loaded
        identity = failures.new_identity()
        flags = lib.VX_MAP_IN_PLACE if in_place else 0
        flags |= lib.VX_MAP_READ_ONLY if read_only else 0
        flags |= lib.VX_MAP_GATED if gated else 0
        flags |= lib.VX_MAP_TRANSPARENT if transparent else 0
        flags |= lib.VX_MAP_COMMITS_BELOW if commits_below else 0
        flags |= lib.VX_MAP_IDENTITY if identity_placed else 0
        handle = lib.vx_map_create(
            size,
            largest_size,
            page_size.bit_length() - 1,
            len(lowers),
            flags,
            pool.handle,
            identity,
            upcalls(),
        )
        super().__init__(handle, path)
        self._handler: FaultHandler | None = handler
        self._pool = pool  # C uses it as long as the device lives
        self._lowers: dict[int, Device] = {}
        failures.register(identity, self)
        for index, lower in enumerate(lowers):
            if lower is not None:
                self.set_lower(index, lower)
        if parent is not None and sectors is not None:
            shift = sectors.size.bit_length() - 1
            failures.raise_for(
                lib.vx_map_set_parent(self.handle, parent, shift, sectors.mixed_tag, sectors.full_tag)
            )

    def answer(self, fault: Any) -> None:
        """Passes a fault from C (a ``vx_fault *``) to the handler."""
        handler = self._handler
        if handler is None:
            raise ClosedError("the disk was closed", path=self.path)
        with taking_time(ffi.addressof(fault, "time")):
            self._answer(handler, fault)

    def _answer(self, handler: FaultHandler, fault: Any) -> None:
        kind = fault.kind
        if kind == lib.VX_FAULT_LOAD:
            handler.load(fault.first, fault.count)
        elif kind == lib.VX_FAULT_GRANT:
            handler.grant(fault.count)
        elif kind == lib.VX_FAULT_GATE:
            handler.open_gate()
        elif kind == lib.VX_FAULT_RANGE:
            handler.change_range(Operation(fault.operation), fault.first, fault.count, fault.size)
        else:
            count, each = fault.bitmap_count, fault.bitmap_bytes
            bits = np.frombuffer(_copy(fault.bitmap_bits, count * each), np.uint8)
            changes = Changes(
                np.frombuffer(_copy(fault.pages, fault.count * 8), np.uint64),
                np.frombuffer(_copy(fault.entries, fault.count * 8), np.uint64),
                np.frombuffer(_copy(fault.bitmap_pages, count * 8), np.uint64),
                bits.reshape(count, -1) if count else bits.reshape(0, 1),
                fault.generation,
            )
            with gil.computing():
                handler.commit(changes)

    def install(self, first: int, new: npt.NDArray[np.uint64]) -> None:
        """Sets the entries from page ``first`` on that are still ASK; 0 leaves an entry ASK."""
        new = np.ascontiguousarray(new, np.uint64)
        view = ffi.from_buffer("uint64_t[]", new)
        failures.raise_for(lib.vx_map_install(self.handle, first, len(new), view), self.path)

    def set_bitmap(self, page: int, bits: bytes) -> None:
        """Sets the sector bitmap of a page (one bit a sector; 1: stored in this device)."""
        view = ffi.from_buffer("uint8_t[]", bits)
        failures.raise_for(lib.vx_map_set_bitmap(self.handle, page, view, len(view)), self.path)

    def read_entries(self, first: int, count: int) -> npt.NDArray[np.uint64]:
        """The present entries of these pages."""
        result = np.empty(count, np.uint64)
        lib.vx_map_read_entries(self.handle, first, count, ffi.from_buffer("uint64_t[]", result))
        return result

    def drop(self, first_chunk: int, count: int) -> int:
        """Drops clean chunks of :data:`CHUNK_PAGES` entries; returns the number dropped."""
        return lib.vx_map_drop(self.handle, first_chunk, count)

    def replace(
        self,
        pages: npt.NDArray[np.uint64],
        expected: npt.NDArray[np.uint64],
        new: npt.NDArray[np.uint64],
        *,
        publish: bool = True,
    ) -> npt.NDArray[np.bool_]:
        """Replaces entries that equal the expected ones, and waits for accesses under the old ones.

        Returns:
            For each page, whether its entry differed from the expected one and was not changed.
        """
        mismatched = np.zeros(len(pages), np.uint8)
        code = lib.vx_map_replace(
            self.handle,
            len(pages),
            ffi.from_buffer("uint64_t[]", np.ascontiguousarray(pages, np.uint64)),
            ffi.from_buffer("uint64_t[]", np.ascontiguousarray(expected, np.uint64)),
            ffi.from_buffer("uint64_t[]", np.ascontiguousarray(new, np.uint64)),
            publish,
            ffi.from_buffer("uint8_t[]", mismatched),
        )
        failures.raise_for(code, self.path)
        return mismatched.astype(np.bool_)

    def set_lower(self, index: int, lower: Device) -> None:
        """Adds a lower device at an index that has none, at any time; the map keeps it."""
        failures.raise_for(lib.vx_map_set_lower(self.handle, index, lower.handle), self.path)
        self._lowers[index] = lower

    def clear_lower(self, index: int) -> None:
        """Takes a lower device out while the map is in use; commits first.

        Raises:
            InvalidArgumentError: an entry or a grant names it, or it is the parent.
        """
        failures.raise_for(lib.vx_map_clear_lower(self.handle, index), self.path)
        del self._lowers[index]

    @contextlib.contextmanager
    def tracking(self, page: int) -> Iterator[Callable[[], list[int]]]:
        """Notes, inside the block, which parts of ``page`` are changed; one page at a time.

        Yields:
            A function that returns the 64ths of the page that were changed since its last call. It
            waits for the changes that it reports.
        """
        lib.vx_map_track(self.handle, page)

        def take_changes() -> list[int]:
            changes = lib.vx_map_take_changes(self.handle)
            return [part for part in range(64) if changes >> part & 1]

        try:
            yield take_changes
        finally:
            lib.vx_map_track(self.handle, _NO_PAGE)

    def count_accesses(self, *, on: bool) -> None:
        """Switches the counting of accesses by page; it is off at first."""
        failures.raise_for(lib.vx_map_count_accesses(self.handle, on), self.path)

    def take_accesses(self, first: int, count: int) -> Accesses:
        """The accesses of these pages since the last call, which are then forgotten."""
        taken = np.empty((count, 4), np.uint16)
        memory = ffi.cast("vx_accesses *", ffi.from_buffer("uint16_t[]", taken))
        lib.vx_map_take_accesses(self.handle, first, count, memory)
        return Accesses(*taken.T)

    def quiesce(self) -> None:
        """Waits for all accesses in flight."""
        lib.vx_map_quiesce(self.handle)

    def grant(
        self, lower: int, offsets: npt.NDArray[np.uint64], tag: int, *, stale: bool = False
    ) -> None:
        """Grants ready pages at these offsets (bytes) to C; they read as zeros unless ``stale``."""
        view = ffi.from_buffer("uint64_t[]", np.ascontiguousarray(offsets, np.uint64))
        flag = lib.VX_GRANT_STALE if stale else lib.VX_GRANT_FRESH
        failures.raise_for(
            lib.vx_map_grant(self.handle, lower, len(offsets), view, tag, flag), self.path
        )

    def revoke(self) -> npt.NDArray[np.uint64]:
        """Takes back the unused ready pages; returns their offsets (bytes)."""
        parts = []
        while True:
            part = np.empty(4096, np.uint64)
            count = lib.vx_map_revoke(self.handle, 4096, ffi.from_buffer("uint64_t[]", part))
            parts.append(part[:count])
            if count < 4096:
                return np.concatenate(parts)

    def set_gate(self, *, is_open: bool) -> None:
        """Opens or closes the gate; a change at a closed gate faults."""
        lib.vx_map_gate(self.handle, is_open)

    def poison(self) -> None:
        """Fails every further request with PoisonedError."""
        lib.vx_device_set_state(self.handle, failures.E_POISONED)

    def statistics(self) -> dict[str, int]:
        """The fields of ``vx_map_statistics``, by name."""
        found = ffi.new("vx_map_statistics *")
        lib.vx_map_statistics_of(self.handle, found)
        return {name: getattr(found, name) for name, _ in ffi.typeof("vx_map_statistics").fields}

    def close(self) -> None:
        """Refuses new requests, waits for those in flight, and commits the pages they published.

        Raises:
            PoisonedError: these pages could not be made durable.
        """
        try:
            failures.raise_for(lib.vx_map_close(self.handle), self.path)
        finally:
            self._handler = None  # breaks a cycle, so that this object is freed at once
