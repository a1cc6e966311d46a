# SPDX-License-Identifier: MIT
"""Legacy VHD images: reads and writes fixed and dynamic ones, reads differencing ones.

A dynamic image has no log. These rules keep it consistent after a crash. Data, and the bitmaps of
fresh blocks, are durable before the table refers to them. A flush makes the table durable. A new
footer is written behind fresh blocks before the first of them overwrites the old footer. The copy
of the footer at the start of the file stays valid all the time.
"""

from __future__ import annotations

import threading
from typing import Any

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import (
    DamagedError,
    MissingParentError,
    NoSpaceError,
    Reason,
    UnsupportedError,
)
from vhdx.format import vhd
from vhdx.image.parents import Missing
from vhdx.image.plain import PlainImage
from vhdx.image.raw import RawImage
from vhdx.image.reclaim import flush_soon
from vhdx.image.vhd.table import ALIGNMENT, BlockTable, Survey
from vhdx.place import ImageFile
from vhdx.units import GIB, MIB, round_up

__all__ = ["FixedVhd", "VhdImage"]

_OWN, _BELOW = 0, 1
_MIXED_TAG, _FULL_TAG = 1, 2
_GRANT_BYTES = 64 * MIB
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
"""Maps each byte to its reversed bits: in a VHD's bitmaps the first sector is the highest bit."""


class FixedVhd(RawImage):
    """A fixed image: the bytes of the disk, followed by the footer."""

    name = "vhd"
    physical_sector_size = 512

    def __init__(self, host: ImageFile, footer: vhd.Footer, *, write: bool, pool: plane.Pool) -> None:
        size = footer.virtual_size
        if size + vhd.FOOTER_SIZE > host.leaf.size:
            raise DamagedError(
                f"the footer says that the disk has {size} bytes, more than the file",
                reason=Reason.TRUNCATED,
                path=host.path,
                offset=host.leaf.size - vhd.FOOTER_SIZE,
            )
        super().__init__(host, write=write, pool=pool, size=size)
        self._footer = footer

    def describe(self) -> dict[str, Any]:
        """Creator, id and sizes."""
        return {**_common(self._footer, "fixed"), **super().describe(), "parent": None}


def _common(footer: vhd.Footer, kind: str) -> dict[str, Any]:
    return {
        "type": kind,
        "creator": footer.creator.decode("latin-1").rstrip("\0 "),
        "disk_id": str(footer.unique_id),
    }


class _Zeros:
    """Stands below a dynamic image, which has no parent: reads as zeros."""

    def __init__(self, leaf: plane.Device, size: int, pool: plane.Pool) -> None:
        self.device = plane.Map(self, size, size, 4 * GIB, [leaf], read_only=True, pool=pool)

    def load(self, first: int, count: int) -> None:
        self.device.install(first, np.full(count, plane.entries(plane.Kind.HOLE, 0, 0, 0), np.uint64))

    def grant(self, wanted: int) -> None:
        raise UnsupportedError("zeros take no data")

    def open_gate(self) -> None:
        raise UnsupportedError("zeros take no data")

    def change_range(self, operation: plane.Operation, first: int, count: int, size: int) -> None:
        raise UnsupportedError("zeros take no data")

    def commit(self, changes: plane.Changes) -> None:
        raise UnsupportedError("zeros take no data")


class VhdImage(PlainImage):
    """An open dynamic or differencing image: the fault handler of its map.

    Threads: faults may come from any thread. ``_gate_lock`` makes the preparation for the first
    change happen once. ``_lock`` guards the table and the lists of space; it is not held across a
    barrier. The map's rounds serialise commits.

    Args:
        host: the file, which the image owns.
        footer, header: of the file.
        parent: the image below, or None.
        missing: why a differencing image has no parent here.
        write: allow changes.
        pool: for background work.
    """

    name = "vhd"
    physical_sector_size = 512

    def __init__(
        self,
        host: ImageFile,
        footer: vhd.Footer,
        header: vhd.DynamicHeader,
        parent: PlainImage | None,
        missing: MissingParentError | None,
        *,
        write: bool,
        pool: plane.Pool,
    ) -> None:
        super().__init__(host, write=write)
        self._footer, self._header, self._parent = footer, header, parent
        self._leaf = host.leaf
        self.block_size = header.block_size
        self.size = footer.virtual_size
        self._lock = threading.Lock()
        self._gate_lock = threading.Lock()
        self._changed = False  # under _gate_lock
        # Table sectors that a failed commit may have written; only commits use it, one at a time.
        self._unsure: set[int] = set()
        # Under _lock from here on:
        self._released: list[tuple[int, int]] = []  # generation, offset of the data
        self._table = BlockTable(host, footer, header)
        self._bitmap = self._table.bitmap
        self._in_use = len(self._table.used())  # and granted places
        self._end, self._free, self._kept_end = (
            self._table.survey() if write else Survey(self._leaf.size, [], 0)
        )
        below: plane.Device
        if footer.disk_type == vhd.DiskType.DYNAMIC:
            self._zeros = _Zeros(self._leaf, max(self.size, 1), pool)
            below = self._zeros.device
        elif parent is not None:
            below = parent.device
        else:
            assert missing is not None
            below = plane.Callback(Missing(host.path, missing), self.size, read_only=True)
        self.device = plane.Map(
            self,
            self.size,
            max(self.size, 1),
            self.block_size,
            [self._leaf, below],
            parent=_BELOW,
            sectors=plane.Sectors(vhd.SECTOR, _MIXED_TAG, _FULL_TAG),
            read_only=not write,
            gated=write,
            pool=pool,
            path=host.path,
        )

    # ---- the map's fault handlers ----

    def load(self, first: int, count: int) -> None:
        """Installs the entries of the chunks that hold these blocks."""
        start = first // plane.CHUNK_PAGES * plane.CHUNK_PAGES
        stop = min(-(-(first + count) // plane.CHUNK_PAGES) * plane.CHUNK_PAGES, self._table.blocks)
        if stop <= start:
            return
        with self._lock:
            blocks, bad = self._table.stored(start, stop - start)
            if self._footer.disk_type == vhd.DiskType.DYNAMIC:
                new = np.full(stop - start, plane.entries(plane.Kind.HOLE, 0, 0, 0), np.uint64)
            else:
                where = np.arange(start, stop, dtype=np.uint64) * np.uint64(self.block_size)
                new = plane.entries(plane.Kind.SHARED, _BELOW, where, 0)
            offsets = self._table.entries[blocks].astype(np.uint64) * np.uint64(512) + np.uint64(
                self._bitmap
            )
            new[bad - start] = 0
            new[blocks - start] = plane.entries(plane.Kind.DATA, _OWN, offsets, _FULL_TAG)
            for block, offset in zip(blocks.tolist(), offsets.tolist(), strict=True):
                bits = self._leaf.read(self._bitmap, offset - self._bitmap)
                length = self.block_size // vhd.SECTOR // 8
                if bits[:length].count(0xFF) == length:
                    continue
                self.device.set_bitmap(block, bits[:length].translate(_REVERSED))
                new[block - start] = plane.entries(plane.Kind.MIXED, _OWN, offset, _MIXED_TAG)
            self.device.install(start, new)
        self._table.refuse(bad[(bad >= first) & (bad < first + count)])

    def open_gate(self) -> None:
        """Makes the footer's copy at the start durable, then moves the footer at the end."""
        with self._gate_lock:
            if not self._changed:
                # A valid copy agrees with the footer: the open for writing has checked that.
                if vhd.parse_footer(self._leaf.read(vhd.FOOTER_SIZE, 0)) is None:
                    self._leaf.write(self._footer.pack(), 0)
                    self._leaf.flush()
                self._write_footer(max(self._end, self._leaf.size - vhd.FOOTER_SIZE))
                self._changed = True
        self.device.set_gate(is_open=True)

    def _write_footer(self, at: int) -> None:
        at = round_up(at, vhd.SECTOR)
        self._leaf.resize(at + vhd.FOOTER_SIZE)
        self._leaf.write(self._footer.pack(), at)

    def grant(self, wanted: int) -> None:
        """Grants freed places if there are any, else fresh ones at the end of the file."""
        with self._lock:
            # Ahead only as many as the disk lacks, so that the file does not outgrow the disk much.
            lacking = self._table.blocks - self._in_use + len(self._released)
            count = max(wanted, min(_GRANT_BYTES // self.block_size, lacking))
            if count <= 0:
                return
            offsets, end = self._free[:count], self._end
            if not offsets:
                try:
                    offsets, end = self._fresh(count)
                except NoSpaceError:
                    offsets, end = self._fresh(max(wanted, 1))
            ones, steps = b"\xff" * self._bitmap, []
            for at in offsets:
                if end == self._end:  # a freed place may hold old data
                    steps.append(plane.Step(plane.Operation.ZERO, at, self.block_size))
                steps.append(_write(at - self._bitmap, ones))
            self._leaf.batch(steps)
            self.device.grant(_OWN, np.array(offsets, np.uint64), _FULL_TAG)
            if end == self._end:
                del self._free[: len(offsets)]
            self._end = end
            self._in_use += len(offsets)

    def _fresh(self, count: int) -> tuple[list[int], int]:
        """Places at the end of the file, and the end offset of the last one."""
        offsets: list[int] = []
        end = self._end
        for _ in range(count):
            # Align the data to 4 KiB, whatever the bitmap's length.
            data = round_up(end + self._bitmap, ALIGNMENT)
            if (data - self._bitmap) // vhd.SECTOR >= vhd.UNUSED:
                if not offsets:
                    raise NoSpaceError("a VHD file cannot exceed 2 TiB", path=self.path)
                break
            offsets.append(data)
            end = data + self.block_size
        start = self._end
        # Overwrites the old footer; until the new one is durable, the copy at the start serves.
        self._write_footer(end)
        footer = self._leaf.size - vhd.FOOTER_SIZE
        self._leaf.zero(start, footer - start, no_hole=not self.host.sparse)
        return offsets, end

    def change_range(self, operation: plane.Operation, first: int, count: int, size: int) -> None:
        """Makes whole blocks holes; a zeroed and a trimmed block are the same in a VHD."""
        del operation, size
        hole = plane.entries(plane.Kind.HOLE, 0, 0, 0)
        for start in range(first, min(first + count, self._table.blocks), 4096):
            pages = np.arange(
                start, min(start + 4096, first + count, self._table.blocks), dtype=np.uint64
            )
            while len(pages):
                low, high = int(pages[0]), int(pages[-1]) + 1
                found = self.device.read_entries(low, high - low)[
                    (pages - np.uint64(low)).astype(np.int64)
                ]
                if (found == 0).any():
                    self.load(low, high - low)
                    continue
                stored = found != hole
                pages, found = pages[stored], found[stored]
                if not len(pages):
                    break
                mismatched = self.device.replace(pages, found, np.full(len(pages), hole, np.uint64))
                generation = self.device.statistics()["dirty_generation"]
                offsets = plane.fields(found[~mismatched])[1].tolist()
                with self._lock:
                    self._released += [(generation, offset) for offset in offsets]
                    waiting = len(self._released) * self.block_size
                flush_soon(self.device, much=waiting > max(_GRANT_BYTES, self.size // 4))
                pages = pages[mismatched]

    def commit(self, changes: plane.Changes) -> None:
        """Writes table entries and sector bitmaps; the data are durable already."""
        blocks, last = np.unique(changes.pages[::-1], return_index=True)
        kinds, offsets, _ = plane.fields(changes.entries[::-1][last])
        with self._lock:
            values = ((offsets - np.uint64(self._bitmap)) // np.uint64(vhd.SECTOR)).astype(np.uint32)
            values[kinds == plane.Kind.HOLE] = vhd.UNUSED
            before = self._table.entries[blocks]
            ones = b"\xff" * self._bitmap
            # Blocks at an unchanged offset were MIXED before, and hold all their sectors now.
            full = offsets[(kinds == plane.Kind.DATA) & (before == values)]
            steps = [_write(at - self._bitmap, ones) for at in full.tolist()]
            done = set(blocks.tolist())
            for block, bits in zip(changes.bitmap_pages.tolist(), changes.bitmaps, strict=True):
                if block not in done and self._table.entries[block] != vhd.UNUSED:
                    content = bits.tobytes().translate(_REVERSED).ljust(self._bitmap, b"\0")
                    steps.append(_write(int(self._table.entries[block]) * vhd.SECTOR, content))
            self._table.entries[blocks] = values
            unsure = self._unsure | self._table.sectors_of(blocks[before != values])
            steps += self._table.sector_steps(sorted(unsure))
        try:
            self._leaf.batch([*steps, plane.Step(plane.Operation.FLUSH)])
        except BaseException:
            with self._lock:
                # The commit will be retried; it is unknown which of these sectors were written.
                self._table.entries[blocks] = before
                self._unsure = unsure
            raise
        self._unsure = set()
        self._free_committed(changes.generation)

    def _free_committed(self, generation: int) -> None:
        with self._lock:
            ready = [at for when, at in self._released if when <= generation]
        # The space goes back to the host; a place is zeroed when it is granted again. The next open
        # takes non-zero bytes in a gap for another program's data, so the bitmap is zeroed, too.
        steps = []
        for offset in ready:
            steps.append(plane.Step(plane.Operation.ZERO, offset - self._bitmap, self._bitmap))
            # Without ``sparse`` the file keeps trimmed space, so zero the data for the same reason.
            blank = plane.Operation.TRIM if self.host.sparse else plane.Operation.ZERO
            steps.append(plane.Step(blank, offset, self.block_size))
        self._leaf.batch(steps)
        with self._lock:  # only now: a granted place may be written at once
            self._released = [each for each in self._released if each[0] > generation]
            self._free += ready
            self._in_use -= len(ready)

    # ---- facts and the end ----

    @property
    def kind(self) -> str:
        """Its type: "dynamic" or "differencing"."""
        return self._footer.disk_type.name.lower()

    def describe(self) -> dict[str, Any]:
        """Creator, id, sizes, parent, and how many blocks are stored."""
        if not self.read_only:
            self.device.flush()
        with self._lock:
            stored = len(self._table.used())
        name = self._header.parent_name or None
        parent = {
            "path": name,
            "linkage": [str(self._header.parent_id)],
            "found": None if self._parent is None else self._parent.path,
        }
        return {
            **_common(self._footer, self.kind),
            **super().describe(),
            "parent": None if self._footer.disk_type == vhd.DiskType.DYNAMIC else parent,
            "blocks": {"not_present": self._table.blocks - stored, "fully_present": stored},
        }

    @property
    def has_released(self) -> bool:
        """Whether space of trimmed blocks waits for a commit."""
        with self._lock:
            return bool(self._released)

    def chain(self) -> list[dict[str, Any]]:
        """This layer and those below it."""
        return super().chain() + ([] if self._parent is None else self._parent.chain())

    def close(self) -> None:
        """Flushes and closes this layer and those below it."""
        try:
            super().close()
        finally:
            if self._parent is not None:
                self._parent.close()

    def finish(self) -> None:
        """Moves the footer behind the last stored block and cuts the file after it."""
        if self.read_only or not self._changed:
            return
        # Zero the bitmaps of unused granted places, or later opens would keep them as unknown data.
        unused = [at - self._bitmap for at in self.device.revoke().tolist()]
        self._leaf.batch([plane.Step(plane.Operation.ZERO, at, self._bitmap) for at in unused])
        end = round_up(max(self._table.end(), self._kept_end), vhd.SECTOR)
        if end + vhd.FOOTER_SIZE >= self._leaf.size:
            return
        # A crash may lose this footer; then the copy at the start serves.
        self._leaf.write(self._footer.pack(), end)
        self._leaf.resize(end + vhd.FOOTER_SIZE)


def _write(offset: int, data: bytes) -> plane.Step:
    return plane.Step(plane.Operation.WRITE, offset, buffer=data)
