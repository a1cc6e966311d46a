# SPDX-License-Identifier: MIT
"""An open disk, whatever its format: the interface that programs use."""

from __future__ import annotations

import io
import threading
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from vhdx import plane
from vhdx.errors import ClosedError, InUseError, NoSpaceError, RangeError, ReadOnlyError
from vhdx.image.dropped import keep
from vhdx.interrupts import uninterruptible
from vhdx.plane.device import Buffer

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from vhdx.image.contract import Compacted, Format
    from vhdx.interrupts import Progress

__all__ = ["Disk", "Extent", "ExtentState"]


class ExtentState(StrEnum):
    """The state of a range of a disk.

    DATA: some layer of the chain stores the range. ZERO: a layer marks it as zeros. HOLE: no layer
    stores it, and it reads as zeros.
    """

    DATA = "data"
    ZERO = "zero"
    HOLE = "hole"


_STATES = (ExtentState.DATA, ExtentState.ZERO, ExtentState.HOLE)


class Extent:
    """A run of one state.

    Attributes:
        offset: bytes from the start of the disk.
        length: bytes.
        state: the state of the whole run.
        depth: the layer that determines the state: 0 is this image, 1 its parent, and so on; None
            for holes.
    """

    __slots__ = ("depth", "length", "offset", "state")

    def __init__(self, offset: int, length: int, state: ExtentState, depth: int | None) -> None:
        self.offset = offset
        self.length = length
        self.state = state
        self.depth = depth

    def __repr__(self) -> str:
        return f"Extent({self.offset:#x}, {self.length:#x}, {self.state.value!r}, {self.depth})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Extent):
            return NotImplemented
        return self.as_tuple() == other.as_tuple()

    def __hash__(self) -> int:
        return hash(self.as_tuple())

    def as_tuple(self) -> tuple[int, int, ExtentState, int | None]:
        """Offset, length, state and depth."""
        return self.offset, self.length, self.state, self.depth


def _pace_beside(front_ends: int) -> Callable[[int], None] | None:
    """The pace of a compaction of a disk that is served.

    A compaction with a pace rests after each 64 KiB that it copies; this pace waits for nothing else.
    """
    return (lambda size: None) if front_ends else None


class Disk:
    """An open disk image; every method may be called from any thread.

    Offsets and lengths are in bytes; they need no alignment. What :meth:`flush` has covered
    survives a crash of the host. Use the disk as a context manager, or call :meth:`close`.

    Python's signal handlers never interrupt an operation in the middle. A handler that raises, as
    Ctrl-C does, makes a long operation stop at a point where the image is consistent.
    """

    def __init__(self, image: Format) -> None:
        self._image = image
        self._device = image.device
        self._lock = threading.Lock()
        self._users = 0  # under _lock: front ends that serve it
        self._closed = False  # under _lock
        self._forget = keep(self, image)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "r" if self.read_only else "r+"
        return f"<vhdx.Disk {self._image.path!r} {self._image.name} {state}>"

    # ---- facts ----

    @property
    def path(self) -> str:
        """The path of the image, as it was opened."""
        return self._image.path

    @property
    def format(self) -> str:
        """The name of the image format: "vhdx", "vhd" or "raw"."""
        return self._image.name

    @property
    def size(self) -> int:
        """Size of the virtual disk in bytes."""
        return self._device.size

    @property
    def block_size(self) -> int:
        """Bytes of a block, the unit in which the format allocates space."""
        return self._image.block_size

    @property
    def logical_sector_size(self) -> int:
        """512 or 4096 bytes; the unit in which a guest addresses the disk."""
        return self._image.logical_sector_size

    @property
    def physical_sector_size(self) -> int:
        """512 or 4096 bytes; the alignment that a guest should use."""
        return self._image.physical_sector_size

    @property
    def read_only(self) -> bool:
        """Whether changes are refused."""
        return self._image.read_only

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def key(self) -> tuple[int, int]:
        """(device, inode), which identify the image's file whatever its path."""
        return self._image.key

    @property
    def minimum_size(self) -> int | None:
        """Bytes below which a shrink would cut off a partition; None if that is unknown."""
        self._check_open()
        return self._image.minimum_size

    def describe(self) -> dict[str, Any]:
        """The facts that ``vhdx info --json`` shows; sizes in bytes."""
        self._check_open()
        return {
            "path": self.path,
            "format": self.format,
            "virtual_size": self.size,
            "block_size": self.block_size,
            "logical_sector_size": self.logical_sector_size,
            "physical_sector_size": self.physical_sector_size,
            **self._image.describe(),
        }

    # ---- reading ----

    def pread(self, length: int, offset: int) -> bytes:
        """Reads ``length`` bytes at ``offset``.

        Raises:
            RangeError: the range is not inside the disk; there are no short reads.
        """
        return self._device.read(length, offset)

    def preadinto(self, buffer: Buffer, offset: int) -> int:
        """Fills ``buffer`` (writable, contiguous) from ``offset`` on; returns its length."""
        return self._device.read_into(buffer, offset)

    def preadv(self, buffers: Iterable[Buffer], offset: int) -> int:
        """Fills ``buffers`` one after the other; returns the bytes read."""
        buffers = list(buffers)  # read twice, and it may be an iterator
        self._check_range(buffers, offset)
        done = 0
        for buffer in buffers:
            done += self._device.read_into(buffer, offset + done)
        return done

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Runs of one state that cover the range (the whole disk by default), in order."""
        if length is None:
            length = max(0, self.size - offset)
        run: plane.RawExtent | None = None
        for raw in self._image.extents(offset, length):
            if run is not None and (run.state, run.depth) == (raw.state, raw.depth):
                run = run._replace(length=run.length + raw.length)
                continue
            if run is not None:
                yield _extent(run)
            run = raw
        if run is not None:
            yield _extent(run)

    # ---- changing ----

    def pwrite(self, data: Buffer, offset: int, *, fua: bool = False) -> int:
        """Writes ``data`` at ``offset``; returns its length.

        Args:
            data: any object with the buffer protocol.
            offset: bytes.
            fua: make the data durable before returning.

        Raises:
            RangeError: the range is not inside the disk; there are no short writes.
            ReadOnlyError: the disk is open for reading only.
            NoSpaceError: the host is out of space. Each sector of the range holds its old or new
                content; everything else is unchanged. The disk is usable again as soon as there is
                space.
        """
        return self._device.write(data, offset, fua=fua)

    def pwritev(self, buffers: Iterable[Buffer], offset: int, *, fua: bool = False) -> int:
        """Writes ``buffers`` one after the other; returns the bytes written."""
        buffers = list(buffers)
        self._check_range(buffers, offset)
        done = 0
        for buffer in buffers:
            done += self._device.write(buffer, offset + done, fua=fua)
        return done

    def _check_range(self, buffers: Sequence[Buffer], offset: int) -> None:
        # Checks the whole range first, so that there is no partial transfer.
        end = offset + sum(memoryview(buffer).nbytes for buffer in buffers)
        if offset < 0 or end > self.size:
            raise RangeError(
                "the range is not inside the disk", path=self.path, offset=max(offset, 0)
            )

    def zero(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Makes the range read as zeros; a dynamic image frees the space of whole blocks."""
        self._device.zero(offset, length, fua=fua)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Discards the range; afterwards it reads as before or as zeros."""
        self._device.trim(offset, length, fua=fua)

    def flush(self) -> None:
        """Makes durable what every call that has returned has written."""
        self._device.flush()

    def reclaim(self) -> None:
        """Returns the space of trimmed blocks to the host now, by a flush if any space waits."""
        self._check_open()
        if self._image.has_released:
            self.flush()

    @uninterruptible
    def resize(
        self, size: int, *, shrink: bool = False, unsafe: bool = False, move_gpt: bool = False
    ) -> str | None:
        """Changes the size while the disk is in use; the added range reads as zeros.

        The guest must adjust its partitions and file systems. After a crash the disk has the old
        size or the new one.

        Args:
            size: bytes, a multiple of the logical sector.
            shrink: allow a smaller size, but not below the end of the last partition.
            unsafe: allow a shrink that cuts off the backup GPT, or one where the partition table is
                missing or empty, so that it is unknown what is in use.
            move_gpt: move the backup GPT to the new end; no guest may use the disk meanwhile.

        Returns:
            What remains to be done in the guest, or None.

        Raises:
            InvalidArgumentError: the size is not possible, or it would cut off a partition.
            NoSpaceError: the host is out of space; nothing is changed.
            UnsupportedError: the format does not support it, or the size is below the parent's.
        """
        self._check_open()
        return self._image.resize(size, shrink=shrink, unsafe=unsafe, move_gpt=move_gpt)

    @uninterruptible
    def snapshot(self, checkpoint: str | os.PathLike[str] | None = None) -> str:
        """Keeps the current content as a checkpoint and continues in a new child.

        The disk may be in use. The current file becomes the checkpoint, and the child takes the
        disk's name. Requests wait for as long as a flush takes. The checkpoint holds what every
        request that had returned has written, and nothing of a later request. After a crash there
        is the disk as it was, or the child over the checkpoint.

        Args:
            checkpoint: the path of the checkpoint, in the same file system; when None, the disk's
                name with the time.

        Returns:
            The path of the checkpoint. It must not be changed as long as the child needs it.

        Raises:
            ExistsError, HostIOError, NoSpaceError: nothing is changed.
            UnsupportedError: the format has no children.
        """
        self._check_open()
        return self._image.snapshot(checkpoint)

    @uninterruptible
    def compact(
        self,
        *,
        progress: Progress | None = None,
        cancel: Callable[[], bool] | None = None,
        pace: Callable[[int], None] | None = None,
    ) -> Compacted:
        """Gives space back to the host while the disk is in use.

        Blocks of zeros are freed, other blocks are moved towards the start of the file, and the
        file is truncated. A crash or a cancellation at any moment leaves the content unchanged.

        Args:
            progress: called with the work done and the total work, in an internal unit.
            cancel: called between blocks; the compaction stops when it returns True.
            pace: called before each block with the bytes of I/O to come; it may wait.

        Raises:
            VhdxError: reason CANCELLED when cancelled.
        """
        self._check_open()
        return self._image.compact(progress, cancel, pace or _pace_beside(self._users))

    @property
    def chain(self) -> list[dict[str, Any]]:
        """The layers of the disk, this one first: path, type, sizes in bytes, ids."""
        self._check_open()
        return self._image.chain()

    # ---- closing, and use by other libraries ----

    def as_file(self) -> io.RawIOBase:
        """A file object over the disk, with its own position, for other libraries."""
        return _DiskFile(self)

    @uninterruptible
    def close(self) -> None:
        """Flushes and closes; a second call does nothing.

        Raises:
            InUseError: a server still serves the disk.
            VhdxError: some data could not be made durable. The files are closed nevertheless.
        """
        with self._lock:
            if self._closed:
                return
            if self._users:
                raise InUseError(
                    "a server still serves the disk", path=self.path, hint="stop the server first"
                )
            self._closed = True
        try:
            self._image.close()
        except InUseError:
            with self._lock:
                self._closed = False
            raise
        finally:
            if self._closed:
                self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def share(self) -> plane.Device:
        """The device, for a front end; :meth:`close` is refused until :meth:`unshare`."""
        with self._lock:
            self._check_open()
            self._users += 1
            return self._device

    def unshare(self) -> None:
        """Releases the device that :meth:`share` returned."""
        with self._lock:
            self._users -= 1

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the disk was closed", path=self.path)


def _extent(raw: plane.RawExtent) -> Extent:
    return Extent(raw.offset, raw.length, _STATES[raw.state], None if raw.depth < 0 else raw.depth)


class _DiskFile(io.RawIOBase):
    """A raw binary file over a disk; closing the file leaves the disk open."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._position = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return not self._disk.read_only

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._disk.size}
        if whence not in base:
            raise ValueError(f"whence is {whence}, not 0, 1 or 2")
        if base[whence] + offset < 0:
            raise ValueError("the position would be negative")
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._disk.size - self._position))
        if length:
            self._disk.preadinto(view[:length], self._position)
        self._position += length
        return length

    def write(self, data: Any) -> int:
        if self._disk.read_only:
            raise ReadOnlyError("it is open for reading only", path=self._disk.path)
        view = memoryview(data).cast("B")
        length = max(0, min(len(view), self._disk.size - self._position))
        if length == 0 and len(view):
            raise NoSpaceError("the disk ends here", path=self._disk.path)
        self._disk.pwrite(view[:length], self._position)
        self._position += length
        return length

    def flush(self) -> None:
        if not self.closed and not self._disk.closed and not self._disk.read_only:
            self._disk.flush()
