# SPDX-License-Identifier: MIT
"""Devices: byte-addressed requests to C, with the GIL released while they run.

All offsets and lengths are bytes. Every method may be called from any thread. Methods raise
:class:`vhdx.errors.RangeError` for a range outside the device. On other failures they raise the
error of the layer that failed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import weakref
from enum import IntEnum
from time import monotonic_ns, sleep
from typing import TYPE_CHECKING, Any, NamedTuple

from vhdx.errors import HostIOError, NoSpaceError, RangeError, Reason, VhdxError
from vhdx.plane import failures, gil
from vhdx.plane._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "Device",
    "File",
    "Injector",
    "Level",
    "Memory",
    "Operation",
    "Pool",
    "Step",
    "Switch",
    "shared_pool",
    "together",
]

Buffer = bytes | bytearray | memoryview | Any

DATA, ZERO, HOLE = lib.VX_EXTENT_DATA, lib.VX_EXTENT_ZERO, lib.VX_EXTENT_HOLE

_FUA, _NO_HOLE, _FAST = lib.VX_FUA, lib.VX_NO_HOLE, lib.VX_FAST
_EXTENTS_AT_ONCE = 1024
_POOL_THREADS = 16
_POOL_BYTES = 512 << 20


class Operation(IntEnum):
    """Operations of a request (``enum vx_operation``)."""

    READ = lib.VX_READ
    WRITE = lib.VX_WRITE
    ZERO = lib.VX_ZERO
    TRIM = lib.VX_TRIM
    FLUSH = lib.VX_FLUSH
    EXTENTS = lib.VX_EXTENTS


class RawExtent(NamedTuple):
    """A run of one state (DATA, ZERO or HOLE); depth is -1 for holes."""

    offset: int
    length: int
    state: int
    depth: int


class Step(NamedTuple):
    """One step of :meth:`Device.batch`; ``buffer`` only for READ (writable) and WRITE."""

    operation: Operation
    offset: int = 0
    length: int = 0
    buffer: Buffer | None = None


_devices: weakref.WeakSet[Device] = weakref.WeakSet()


def _fail_in_child() -> None:
    for device in _devices:
        lib.vx_device_set_state(device.handle, failures.E_FORKED)


os.register_at_fork(after_in_child=_fail_in_child)


class Level(IntEnum):
    """Levels of pools, from the disks up to the client.

    A job waits only for jobs of lower levels, so stacked devices never wait for a thread that waits
    for them (``csrc/core/pool.h``).
    """

    SPACE = 1
    VOLUME = 2
    IMAGE = 3
    DISK = 4
    SERVER = 5


class Pool:
    """A thread pool for operations that may block (``csrc/core/pool.h``).

    Args:
        threads: the most threads; there is one at first.
        byte_limit: bytes of payload that connections may borrow together.
        level: of the devices whose work the pool does.
    """

    def __init__(
        self,
        threads: int = _POOL_THREADS,
        byte_limit: int = _POOL_BYTES,
        level: Level = Level.SERVER,
    ) -> None:
        handle = lib.vx_pool_create(threads, byte_limit, level)
        if handle == ffi.NULL:
            raise HostIOError("the host is out of memory", reason=Reason.NO_MEMORY)
        self.handle = handle
        self._process = os.getpid()

    @property
    def bytes_waiting(self) -> int:
        """Bytes of payload that connections borrow from the pool now; 0 once it is closed."""
        return 0 if self.handle == ffi.NULL else lib.vx_pool_charged(self.handle)

    def close(self) -> None:
        """Runs all queued jobs and stops the threads; the pool must not be used afterwards."""
        handle, self.handle = self.handle, ffi.NULL
        if self._process == os.getpid():  # a forked child does not have its threads
            lib.vx_pool_destroy(handle)


_shared_pools: dict[Level, tuple[int, Pool]] = {}  # with the process that made it
_shared_pools_lock = threading.Lock()


def shared_pool(level: Level) -> Pool:
    """The pool that all devices of ``level`` in this process share; it adds threads when needed."""
    with _shared_pools_lock:
        process, pool = _shared_pools.get(level, (0, None))
        if pool is None or process != os.getpid():
            pool = Pool(level=level)
            _shared_pools[level] = (os.getpid(), pool)
        return pool


class _Thread(threading.local):
    time: Any = ffi.NULL  # a vx_time while a fault is answered: when its I/O starts, and is done


_thread = _Thread()


@contextlib.contextmanager
def taking_time(time: Any) -> Iterator[None]:
    """I/O of this thread inside the block hands modelled delays up to ``time`` and never sleeps."""
    outer, _thread.time = _thread.time, time
    try:
        yield
    finally:
        _thread.time = outer


class Device:
    """A device of the data plane; the object owns one reference to it.

    Attributes:
        handle: the C device.
        path: the file to name in errors, or None.
        is_block_device: whether its size is fixed; then it may hold any data from the start.
        is_erased: whether what the block device held was given up for a new image.
    """

    is_block_device = False
    is_erased = False

    def __init__(self, handle: Any, path: str | None = None) -> None:
        if handle == ffi.NULL:
            raise HostIOError("the host is out of memory", reason=Reason.NO_MEMORY, path=path)
        self.handle = ffi.gc(handle, lib.vx_device_release)
        self.path = path
        _devices.add(self)

    @property
    def size(self) -> int:
        """The size in bytes."""
        return lib.vx_device_size(self.handle)

    @property
    def state(self) -> int:
        """0, or the negative code with which every further request fails."""
        return lib.vx_device_state(self.handle)

    def read_into(self, buffer: Buffer, offset: int) -> int:
        """Reads from ``offset`` into ``buffer`` (writable, contiguous); returns its length."""
        view = ffi.from_buffer("uint8_t[]", buffer, True)
        length = len(view)
        code = lib.vx_transfer_at(
            self.handle,
            Operation.READ,
            0,
            view,
            length,
            _offset(offset),
            _thread.time,
            failures.failure_buffer(),
        )
        if code:
            ffi.release(view)  # a traceback must not keep the caller's memory lent out
            failures.raise_for(code, self.path)
        return length

    def read(self, length: int, offset: int) -> bytes:
        """Reads ``length`` bytes at ``offset``."""
        size = self.size
        if not 0 <= offset <= size or not 0 <= length <= size - offset:
            failures.raise_for(self.state, self.path)
            raise RangeError(
                "the range is not inside the disk", path=self.path, offset=max(offset, 0)
            )
        buffer = bytearray(length)
        self.read_into(buffer, offset)
        return bytes(buffer)

    def write(self, data: Buffer, offset: int, *, fua: bool = False) -> int:
        """Writes ``data`` at ``offset``; durable on return with ``fua``. Returns its length."""
        view = ffi.from_buffer("uint8_t[]", data)
        length = len(view)
        code = lib.vx_transfer_at(
            self.handle,
            Operation.WRITE,
            _FUA if fua else 0,
            view,
            length,
            _offset(offset),
            _thread.time,
            failures.failure_buffer(),
        )
        if code:
            ffi.release(view)
            failures.raise_for(code, self.path)
        return length

    def zero(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> None:
        """Makes the range read as zeros.

        Args:
            offset: bytes.
            length: bytes.
            fua: durable on return.
            no_hole: keep the range allocated, so that a later write needs no space.
            fast: raise UnsupportedError unless zeroing is faster than writing zeros.
        """
        flags = (_FUA if fua else 0) | (_NO_HOLE if no_hole else 0) | (_FAST if fast else 0)
        self._plain(Operation.ZERO, flags, offset, length)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """Gives the hint that the content of the range is no longer needed."""
        self._plain(Operation.TRIM, _FUA if fua else 0, offset, length)

    def flush(self) -> None:
        """Makes the writes of all requests that have returned durable."""
        self._plain(Operation.FLUSH, 0, 0, 0)

    def _plain(self, operation: int, flags: int, offset: int, length: int) -> None:
        code = lib.vx_transfer_at(
            self.handle,
            operation,
            flags,
            ffi.NULL,
            _offset(length),
            _offset(offset),
            _thread.time,
            failures.failure_buffer(),
        )
        if code:
            failures.raise_for(code, self.path)

    def extents(self, offset: int, length: int) -> Iterator[RawExtent]:
        """Yields extents that cover the range in order; adjacent ones may have the same state."""
        found = ffi.new("vx_extent[]", _EXTENTS_AT_ONCE)
        end = offset + length
        while True:
            count = lib.vx_list_extents(
                self.handle,
                _offset(offset),
                _offset(end - offset),
                found,
                _EXTENTS_AT_ONCE,
                failures.failure_buffer(),
            )
            if count < 0:
                failures.raise_for(count, self.path)
            for i in range(count):
                extent = found[i]
                offset = extent.offset + extent.length
                yield RawExtent(extent.offset, extent.length, extent.state, extent.depth)
            if offset >= end or count == 0:
                return

    def batch(self, steps: Sequence[Step]) -> None:
        """Executes ``steps`` in order, in one call; stops at the first failure."""
        array = ffi.new("vx_step[]", len(steps))
        keep = []
        for i, step in enumerate(steps):
            slot = array[i]
            slot.operation = step.operation
            slot.offset = step.offset
            slot.length = step.length
            if step.buffer is not None:
                view = ffi.from_buffer("uint8_t[]", step.buffer, step.operation == Operation.READ)
                keep.append(view)
                slot.buffer = view
                slot.length = len(view)
        with gil.waiting():
            code = lib.vx_batch(
                self.handle, array, len(steps), _thread.time, failures.failure_buffer()
            )
        if code:
            for view in keep:
                ffi.release(view)
            failures.raise_for(code, self.path)

    def freeze(self) -> None:
        """Refuses new changes; changes in flight continue."""
        lib.vx_device_freeze(self.handle)

    def resize(self, size: int) -> None:
        """Changes the size to ``size`` bytes."""
        code = lib.vx_device_resize(self.handle, _offset(size))
        if code:
            failures.raise_for(code, self.path)


def together(
    pool: Pool,
    operation: Operation,
    targets: Sequence[tuple[Device, int]],
    data: Buffer = b"",
) -> list[VhdxError | None]:
    """Does one operation on several devices at once.

    Args:
        pool: lends its free threads; of a higher level than the pools of the devices.
        operation: WRITE or FLUSH.
        targets: devices, and offsets in bytes.
        data: what to write.

    Returns:
        For each device, why it failed, or None.
    """
    count = len(targets)
    view = ffi.from_buffer("uint8_t[]", data)
    found = ffi.new("vx_failure[]", count)
    time = ffi.new("vx_time *") if _thread.time == ffi.NULL else _thread.time
    code = lib.vx_transfer_together(
        pool.handle,
        count,
        ffi.new("vx_device *[]", [device.handle for device, _ in targets]),
        operation,
        view,
        len(view),
        ffi.new("uint64_t[]", [_offset(offset) for _, offset in targets]),
        time,
        found,
    )
    failures.raise_for(code)
    if _thread.time == ffi.NULL and time.ns and not time.is_virtual:  # a delay below
        sleep(max(0, time.ns - monotonic_ns()) / 1e9)
    return [failures.error_of(found[i], device.path) for i, (device, _) in enumerate(targets)]


def _offset(value: int) -> int:
    # RangeError says more than the OverflowError that cffi would raise.
    if 0 <= value < 1 << 64:
        return value
    raise RangeError(f"{value} is not a position in a disk", reason=Reason.RANGE)


class File(Device):
    """A host file or block device (``csrc/leaf/file.h``).

    Args:
        fd: an open descriptor; the device takes ownership of it.
        size: accessible bytes; changes only by :meth:`Device.resize`.
        read_only: refuse changes.
        sparse: give trimmed and zeroed space back to the host.
        bulk: a new file that large writes will fill.
        path: the name in errors.
    """

    def __init__(
        self,
        fd: int,
        size: int,
        *,
        read_only: bool,
        sparse: bool = True,
        bulk: bool = False,
        path: str | None = None,
    ) -> None:
        memory = _is_memory_file_system(fd)
        flags = lib.VX_FILE_READ_ONLY if read_only else 0
        flags |= lib.VX_FILE_SPARSE if sparse else 0
        flags |= lib.VX_FILE_MEMORY if memory else 0
        flags |= lib.VX_FILE_ALLOCATE if bulk and not memory else 0
        self.is_block_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        flags |= lib.VX_FILE_FIXED if self.is_block_device else 0
        identity = failures.new_identity()
        super().__init__(lib.vx_file_create(fd, size, flags, identity), path)
        failures.register(identity, self)  # errors name this file

    def resize(self, size: int) -> None:
        """Changes the size to ``size`` bytes; a block device that is larger keeps its size.

        Raises:
            NoSpaceError: the block device is smaller.
        """
        if self.is_block_device and size > self.size:
            raise NoSpaceError(
                f"the block device has {self.size} bytes, and {size} are needed; it cannot grow",
                path=self.path,
                hint="use a larger device, or a file",
            )
        super().resize(size)

    @property
    def barriers(self) -> int:
        """Barriers that reached the file so far."""
        return lib.vx_file_barriers(self.handle)

    def close(self) -> None:
        """Closes the descriptor; no request may be in flight."""
        lib.vx_file_close(self.handle)


_TMPFS_MAGIC, _RAMFS_MAGIC = 0x01021994, 0x858458F6


def _is_memory_file_system(fd: int) -> bool:
    # Reads from such a file system never block, but it does not support RWF_NOWAIT to show that.
    try:
        target = os.stat(f"/proc/self/fd/{fd}").st_dev
        device = f"{os.major(target)}:{os.minor(target)}"
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] == device:
                    return fields[fields.index("-") + 1] in {"tmpfs", "ramfs"}
    except (OSError, ValueError, IndexError):
        pass
    return False


class Memory(Device):
    """A device in memory, for tests."""

    def __init__(self, size: int, capacity: int | None = None) -> None:
        handle = lib.vx_memory_create(size, size if capacity is None else capacity, 0)
        super().__init__(handle)


class Switch(Device):
    """A device whose lower device can be replaced at a consistent point (``csrc/map/switch.h``).

    Args:
        lower: the first lower device.
        pool: resumes requests that were parked during a pause.
    """

    def __init__(self, lower: Device, pool: Pool) -> None:
        super().__init__(lib.vx_switch_create(lower.handle, pool.handle, 0), lower.path)
        self._keep = (pool, lower)
        self._pool = pool

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps requests out of the lower device until the block ends; one thread at a time."""
        lib.vx_switch_pause(self.handle)
        try:
            yield
        finally:
            lib.vx_switch_resume(self.handle)

    def set(self, lower: Device) -> None:
        """Replaces the lower device; only inside :meth:`paused`."""
        lib.vx_switch_set(self.handle, lower.handle)
        self._keep = (self._pool, lower)

    def follow(self) -> None:
        """Takes over the new size of the lower device after a resize."""
        lib.vx_switch_follow(self.handle)


class Injector(Device):
    """Parks, delays and fails requests to a lower device, for tests (``csrc/sim/injector.h``)."""

    def __init__(self, lower: Device, pool: Pool) -> None:
        identity = failures.new_identity()
        super().__init__(lib.vx_injector_create(lower.handle, pool.handle, identity), lower.path)
        failures.register(identity, self)
        self._pool = pool

    def set(
        self,
        *,
        park: Iterable[Operation] = (),
        park_ns: int = 0,
        delay: Iterable[Operation] = (),
        delay_ns: int = 0,
        again: Iterable[Operation] = (),
        fail: Iterable[Operation] = (),
        fail_after: int = 0,
        fail_code: int = failures.E_IO,
    ) -> None:
        """Replaces all settings; see ``vx_injector_settings``."""
        settings = ffi.new("vx_injector_settings *")
        settings.park_mask, settings.park_ns = _mask(park), park_ns
        settings.delay_mask, settings.delay_ns = _mask(delay), delay_ns
        settings.again_mask = _mask(again)
        settings.fail_mask, settings.fail_after = _mask(fail), fail_after
        settings.fail_code = fail_code
        lib.vx_injector_set(self.handle, settings)


def _mask(operations: Iterable[Operation]) -> int:
    mask = 0
    for operation in operations:
        mask |= 1 << operation
    return mask
