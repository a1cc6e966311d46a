# SPDX-License-Identifier: MIT
"""Layouts from Python: rows of slabs on disks (``csrc/array/layout.h``)."""

from __future__ import annotations

import os
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vhdx.arrays import np
from vhdx.errors import (
    ClosedError,
    HostIOError,
    InvalidArgumentError,
    NoSpaceError,
    VhdxError,
)
from vhdx.plane import failures, gil
from vhdx.plane._native import ffi, lib
from vhdx.plane.callback import upcalls
from vhdx.plane.device import Device, Operation, Pool, taking_time

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "COMPARED_BLOCK",
    "MOST_COLUMNS",
    "MOST_COPIES",
    "MOST_DISKS",
    "TIE",
    "DiskFacts",
    "Layout",
    "LayoutHandler",
    "MemberKind",
    "disk_of_entry",
    "is_read",
    "member_entries",
]

MOST_DISKS: int = lib.VX_LAYOUT_DISKS
MOST_COLUMNS: int = lib.VX_LAYOUT_COLUMNS
MOST_COPIES: int = lib.VX_LAYOUT_COPIES
COMPARED_BLOCK: int = lib.VX_LAYOUT_BLOCK
"""Bytes for each verdict of :meth:`Layout.compare`."""
TIE: int = lib.VX_LAYOUT_TIE
"""Bit of a verdict: the copies differ, and no content has a majority."""

_HOLE = lib.VX_HOLE << lib.VX_ENTRY_KIND_SHIFT


class MemberKind(IntEnum):
    """Kinds of entries (``csrc/core/table.h``)."""

    NONE = lib.VX_HOLE
    IN_STEP = lib.VX_DATA
    STALE = lib.VX_STALE
    AWAY = lib.VX_AWAY


def member_entries(
    kind: npt.ArrayLike, disk: npt.ArrayLike, offset: npt.ArrayLike
) -> npt.NDArray[np.uint64]:
    """Entries of :class:`MemberKind`, index of the disk, and offset (bytes, a multiple of 512)."""
    result: npt.NDArray[np.uint64] = (
        (np.asarray(offset, np.uint64) >> np.uint64(9))
        | (np.asarray(disk, np.uint64) << np.uint64(lib.VX_ENTRY_LOWER_SHIFT))
        | (np.asarray(kind, np.uint64) << np.uint64(lib.VX_ENTRY_KIND_SHIFT))
    )
    return result


def disk_of_entry(entry: int) -> int:
    """The disk that an entry names."""
    return entry >> lib.VX_ENTRY_LOWER_SHIFT & 0xFFF


def is_read(entry: int) -> bool:
    """Whether the member of this entry may be read."""
    return bool(entry >> lib.VX_ENTRY_KIND_SHIFT & 7 == lib.VX_DATA)


class DiskFacts(NamedTuple):
    """Counts of one disk: requests, and the slowest that was measured."""

    reads: int
    changes: int
    failures: int
    under_way: int
    slowest_ns: int


class LayoutHandler(Protocol):
    """Owns the rows of a layout; called from any thread, with no lock held.

    A :class:`vhdx.errors.VhdxError` of a declared kind refuses the request; any other exception
    poisons the layout.
    """

    def prepare_row(self, row: int) -> None:
        """Gives the row slabs if it has none, and allows changes of it; durable."""

    def disk_failed(self, disk: int, row: int | None, operation: Operation, error: VhdxError) -> None:
        """Takes a disk that failed a request out of the rows, durably; or raises ``error``.

        Args:
            disk: its index.
            row: the row that the request was for; None for a flush.
            operation: what failed.
            error: why.
        """

    def change_rows(self, operation: Operation, first: int, count: int) -> None:
        """May give the slabs of rows back that are zeroed or trimmed as a whole."""


class Layout(Device):
    """A space: rows of slabs on disks, striped and mirrored.

    Args:
        handler: answers the faults. This object keeps the handler, but nothing keeps this object:
            its owner must hold a reference to it.
        columns: 1 to 64.
        copies: 1 to 3.
        interleave: bytes, a power of two.
        slab: bytes, a power of two.
        size, largest_size: bytes.
        thin: whole rows that are zeroed or trimmed are offered to the handler.
        delayed: a disk has a latency model.
        pool: lends threads for I/O to several disks at once.
        path: the name in errors.

    Attributes:
        slots: members of a column: one more than copies.
        largest_size: bytes to which it can grow.
    """

    is_block_device = True

    def __init__(
        self,
        handler: LayoutHandler,
        *,
        columns: int,
        copies: int,
        interleave: int,
        slab: int,
        size: int,
        largest_size: int,
        thin: bool,
        delayed: bool,
        pool: Pool,
        path: str | None = None,
    ) -> None:
        np.uint64  # noqa: B018 - fail here if numpy cannot be loaded
        powers = all(n > 0 and n & (n - 1) == 0 for n in (interleave, slab))
        if (
            not (1 <= columns <= MOST_COLUMNS and 1 <= copies <= MOST_COPIES and powers)
            or not 4096 <= interleave <= slab
            or not 65536 <= slab <= 1 << 40
            or not 0 <= size <= largest_size <= 1 << 56
        ):
            raise InvalidArgumentError("a layout of these terms is impossible", path=path)
        identity = failures.new_identity()
        terms = ffi.new(
            "vx_layout_terms *",
            (columns, copies, interleave, slab, size, largest_size, thin, delayed),
        )
        super().__init__(lib.vx_layout_create(terms, pool.handle, identity, upcalls()), path)
        self.slots, self.largest_size = copies + 1, largest_size
        self._members = columns * self.slots
        self._handler: LayoutHandler | None = handler
        self._pool = pool
        self._disks: dict[int, Device] = {}
        failures.register(identity, self)

    def answer(self, fault: Any) -> None:
        """Passes a fault from C (a ``vx_fault *``) to the handler."""
        handler = self._handler
        if handler is None:
            raise ClosedError("the space was closed", path=self.path)
        with taking_time(ffi.addressof(fault, "time")), gil.computing():
            if fault.kind == lib.VX_FAULT_ROW:
                handler.prepare_row(fault.first)
            elif fault.kind == lib.VX_FAULT_RANGE:
                handler.change_rows(Operation(fault.operation), fault.first, fault.count)
            else:
                row = None if fault.first == _NO_ROW else fault.first
                operation = Operation(fault.operation)
                if self._is_there(fault):
                    handler.disk_failed(fault.disk, row, operation, self._error_of(fault))

    def _is_there(self, fault: Any) -> bool:
        """Whether the disk that failed is still there, and not another one in its place."""
        disk = self._disks.get(fault.disk)
        return disk is not None and lib.vx_device_identity(disk.handle) == fault.leaf

    def _error_of(self, fault: Any) -> VhdxError:
        kind, reason, message, hint = failures.CODES.get(fault.code, failures.CODES[failures.E_IO])
        if fault.os_error:
            message = os.strerror(fault.os_error).lower()
        disk = self._disks.get(fault.disk)
        if not issubclass(kind, HostIOError):
            kind = HostIOError if fault.code != failures.E_POISONED else kind
        return kind(message, reason=reason, path=None if disk is None else disk.path, hint=hint)

    def resize(self, size: int) -> None:
        """A space keeps its size, as a block device does; its owner makes it larger (:meth:`grow`).

        Raises:
            NoSpaceError: it is smaller.
        """
        if size > self.size:
            raise NoSpaceError(
                f"the space has {self.size} bytes, and {size} are needed",
                path=self.path,
                hint="make the space larger",
            )

    def grow(self, size: int) -> None:
        """Makes the device larger."""
        super().resize(size)

    def set_disk(self, index: int, disk: Device) -> None:
        """Adds a disk at an index that has none, at any time."""
        failures.raise_for(lib.vx_layout_set_disk(self.handle, index, disk.handle), self.path)
        self._disks[index] = disk

    def clear_disk(self, index: int) -> None:
        """Takes a disk out and waits for its requests; nothing happens if there is none."""
        if self._disks.pop(index, None) is not None:
            failures.raise_for(lib.vx_layout_clear_disk(self.handle, index), self.path)

    def replace(
        self,
        rows: npt.NDArray[np.uint64],
        members: npt.NDArray[np.uint32],
        expected: npt.NDArray[np.uint64],
        new: npt.NDArray[np.uint64],
    ) -> int:
        """Replaces entries that equal the expected ones, and waits for accesses under the old ones.

        Returns:
            How many entries differed from the expected ones and were not changed.
        """
        mismatched = np.zeros(len(rows), np.uint8)
        code = lib.vx_layout_replace(
            self.handle,
            len(rows),
            ffi.from_buffer("uint64_t[]", np.ascontiguousarray(rows, np.uint64)),
            ffi.from_buffer("uint32_t[]", np.ascontiguousarray(members, np.uint32)),
            ffi.from_buffer("uint64_t[]", np.ascontiguousarray(expected, np.uint64)),
            ffi.from_buffer("uint64_t[]", np.ascontiguousarray(new, np.uint64)),
            ffi.from_buffer("uint8_t[]", mismatched),
        )
        failures.raise_for(code, self.path)
        return int(code)

    def read_entries(self, first_row: int, count: int) -> npt.NDArray[np.uint64]:
        """The present entries of rows, one line for each row."""
        found = np.zeros((count, self._members), np.uint64)
        lib.vx_layout_read_entries(
            self.handle, first_row, count, ffi.from_buffer("uint64_t[]", found)
        )
        return found

    def set_entries(self, first_row: int, new: npt.NDArray[np.uint64]) -> None:
        """Makes the entries of rows these, whatever they were; only the owner changes entries.

        Args:
            first_row: of ``new``.
            new: one line for each row, its members column by column.
        """
        old = self.read_entries(first_row, len(new))
        row, member = np.nonzero(np.where(old == 0, np.uint64(_HOLE), old) != new)
        if len(row):
            where = row.astype(np.uint64) + np.uint64(first_row)
            self.replace(where, member.astype(np.uint32), old[row, member], new[row, member])

    def mark(self, first_row: int, count: int, *, marked: bool) -> None:
        """Allows changes of rows, or no longer; then it waits for those under way."""
        failures.raise_for(lib.vx_layout_mark(self.handle, first_row, count, marked), self.path)

    def take_changed(self, first_row: int, count: int) -> npt.NDArray[np.bool_]:
        """Which of the rows were changed since the last call."""
        changed = np.zeros(count, np.uint8)
        view = ffi.from_buffer("uint8_t[]", changed)
        failures.raise_for(lib.vx_layout_take_changed(self.handle, first_row, count, view), self.path)
        return changed.astype(np.bool_)

    def set_moving(self, *, moving: bool) -> None:
        """Makes changes of a layout with one copy wait for :meth:`copy`, or no longer."""
        lib.vx_layout_set_moving(self.handle, moving)

    def copy(
        self,
        row: int,
        source: int,
        target: int,
        within: int,
        length: int,
        *,
        compares: bool = False,
    ) -> None:
        """Copies a range of a slab to another member of the same column.

        Args:
            row: the row.
            source: member of the row, in step.
            target: member of the row.
            within: bytes, in the slab.
            length: bytes.
            compares: write only where they differ.
        """
        code = lib.vx_layout_copy(
            self.handle, row, source, target, within, length, compares, failures.failure_buffer()
        )
        failures.raise_for(code, self.path)

    def compare(self, row: int, column: int, within: int, length: int) -> npt.NDArray[np.uint8]:
        """Compares the members of a column that are in step.

        Returns:
            For each block of 4096 bytes 0 if all are equal, or bit i if member i of the column
            differs from what most have, or :data:`TIE` and the bits of all.
        """
        verdicts = np.zeros(-(-length // COMPARED_BLOCK), np.uint8)
        code = lib.vx_layout_compare(
            self.handle,
            row,
            column,
            within,
            length,
            ffi.from_buffer("uint8_t[]", verdicts),
            failures.failure_buffer(),
        )
        failures.raise_for(code, self.path)
        return verdicts

    def facts(self, disk: int) -> DiskFacts:
        """Counts of a disk."""
        found = ffi.new("vx_disk_facts *")
        lib.vx_layout_facts(self.handle, disk, found)
        return DiskFacts(*(getattr(found, name) for name in DiskFacts._fields))

    def forget_slowest(self, disk: int) -> None:
        """Measures the slowest request of a disk anew."""
        lib.vx_layout_forget_slowest(self.handle, disk)

    def changes_and_reads(self) -> int:
        """How many requests the disks have served for this layout, without copies of slabs."""
        return sum(
            facts.reads + facts.changes for facts in (self.facts(index) for index in self._disks)
        )

    def poison(self) -> None:
        """Fails every further request with PoisonedError."""
        lib.vx_device_set_state(self.handle, failures.E_POISONED)

    def close(self) -> None:
        """Fails every further request with ClosedError, and waits for those under way."""
        lib.vx_layout_close(self.handle)
        self._handler = None  # breaks a cycle, so that this object is freed at once


_NO_ROW = (1 << 64) - 1
