# SPDX-License-Identifier: MIT
"""One suite that every kind of device passes: contents, awkward ranges, parked and failing lowers."""

from __future__ import annotations

import errno
import os
import random
import threading

import numpy as np
import pytest

from vhdx import plane
from vhdx.errors import (
    ClosedError,
    HostIOError,
    NoSpaceError,
    PoisonedError,
    RangeError,
    ReadOnlyError,
    UnsupportedError,
)
from vhdx.plane import Operation
from vhdx.plane._native import ffi, lib

SIZE = (1 << 20) - 512
PAGE = 64 << 10


class Bytes:
    """A backend of callback devices: a bytearray, and a record of what was asked."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.calls: list[tuple[str, int, int]] = []

    def pread_into(self, buffer, offset):
        self.calls.append(("read", offset, len(buffer)))
        buffer[:] = self.data[offset : offset + len(buffer)]

    def pwrite(self, data, offset):
        self.calls.append(("write", offset, len(data)))
        self.data[offset : offset + len(data)] = data

    def zero(self, offset, length):
        self.calls.append(("zero", offset, length))
        self.data[offset : offset + length] = bytes(length)

    trim = zero

    def flush(self):
        self.calls.append(("flush", 0, 0))

    def extents(self, offset, length):
        return [plane.device.RawExtent(offset, length, plane.DATA, 0)]

    def resize(self, size):
        self.data = self.data[:size] + bytes(max(0, size - len(self.data)))


class Pages:
    """A fault handler that hands out pages of one lower device, one after the other."""

    def __init__(self, lower: plane.Device, size: int, pool: plane.Pool, grant: int = 4) -> None:
        self.lock = threading.Lock()
        self.next = 0
        self.batch = grant
        self.committed: dict[int, int] = {}
        self.map = plane.Map(self, size, 1 << 30, PAGE, [lower], gated=True, pool=pool)

    def load(self, first, count):
        self.map.install(first, np.full(count, int(plane.entries(plane.Kind.HOLE, 0, 0, 0))))

    def grant(self, wanted):
        with self.lock:
            offsets = np.arange(self.batch, dtype=np.uint64) * np.uint64(PAGE) + np.uint64(self.next)
            self.next += self.batch * PAGE
        self.map.grant(0, offsets, 6)

    def open_gate(self):
        self.map.set_gate(is_open=True)

    def change_range(self, operation, first, count, size):
        pages = np.arange(first, first + count, dtype=np.uint64)
        found = self.map.read_entries(first, count)
        if (found == 0).any():
            self.load(first, count)
            found = self.map.read_entries(first, count)
        hole = plane.entries(plane.Kind.HOLE, 0, 0, plane.TAG_ZERO)
        assert not self.map.replace(pages, found, np.full(count, hole, np.uint64)).any()

    def commit(self, changes):
        self.committed.update(zip(changes.pages.tolist(), changes.entries.tolist(), strict=True))


@pytest.fixture
def pool():
    pool = plane.Pool(threads=4)
    yield pool
    pool.close()


def file_device(tmp_path, size=SIZE, **options):
    fd = os.open(tmp_path / "leaf", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    return plane.File(fd, size, read_only=options.pop("read_only", False), **options)


def make(kind, tmp_path, pool):
    """The device, and what must be kept with it."""
    if kind == "file":
        return file_device(tmp_path), None
    if kind == "file not sparse":
        return file_device(tmp_path, sparse=False), None
    if kind == "callback":
        return plane.Callback(Bytes(SIZE), SIZE), None
    if kind == "memory":
        return plane.Memory(SIZE), None
    if kind.startswith("map"):
        lower = plane.Memory(4 << 20) if kind == "map" else plane.Callback(Bytes(4 << 20), 4 << 20)
        if kind == "map over a device that parks":
            lower = plane.Injector(plane.Memory(4 << 20), pool)
            lower.set(park=list(Operation)[:5], park_ns=100_000)
        handler = Pages(lower, SIZE, pool)
        return handler.map, handler
    lower = plane.Memory(SIZE)
    device = plane.Injector(lower, pool)
    if kind == "hold that parks":
        device.set(park=list(Operation), park_ns=100_000)
    if kind == "hold that delays":
        device.set(delay=list(Operation), delay_ns=100_000)
    return device, lower


KINDS = [
    "file",
    "file not sparse",
    "callback",
    "memory",
    "map",
    "map over a callback",
    "map over a device that parks",
    "hold that parks",
    "hold that delays",
]


@pytest.fixture(params=KINDS)
def device(request, tmp_path, pool):
    device, keep = make(request.param, tmp_path, pool)
    yield device
    if isinstance(device, plane.Map):
        device.close()
    del keep


def test_random_requests_against_a_bytearray(device):
    oracle, rng = bytearray(SIZE), random.Random(7)
    for _ in range(250):
        offset = rng.randrange(SIZE)
        length = min(rng.choice([0, 1, 511, 512, 4096, PAGE, 3 * PAGE]), SIZE - offset)
        choice = rng.randrange(8)
        if choice < 3:
            data = rng.randbytes(length)
            assert device.write(data, offset, fua=choice == 0) == length
            oracle[offset : offset + length] = data
        elif choice == 3:
            device.zero(offset, length, no_hole=rng.random() < 0.5)
            oracle[offset : offset + length] = bytes(length)
        elif choice == 4:
            device.trim(offset, length)
            oracle[offset : offset + length] = device.read(length, offset)
        elif choice == 5:
            device.flush()
        else:
            assert device.read(length, offset) == oracle[offset : offset + length]
    assert device.read(SIZE, 0) == oracle


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (SIZE, 1),
        (SIZE - 1, 2),
        (0, SIZE + 1),
        (SIZE + 1, 0),
        ((1 << 63) - 1, 1),
        (1 << 63, 1 << 63),
        ((1 << 64) - 1, 2),
        (1, (1 << 64) - 1),
        (1 << 64, 1),
        (-1, 1),
    ],
)
def test_ranges_outside_change_nothing(device, offset, length):
    device.write(b"\x5a" * SIZE, 0)
    with pytest.raises(RangeError):
        device.zero(offset, length)
    with pytest.raises(RangeError):
        device.trim(offset, length)
    with pytest.raises(RangeError):
        list(device.extents(offset, length))
    if 0 <= length < 1 << 24:
        with pytest.raises(RangeError):
            device.write(bytes(length), offset)
        with pytest.raises(RangeError):
            device.read(length, offset)
    assert device.read(SIZE, 0) == b"\x5a" * SIZE


def test_zero_length_at_both_ends(device):
    for offset in (0, SIZE):
        assert device.read(0, offset) == b""
        assert device.write(b"", offset) == 0
        device.zero(offset, 0)
        device.trim(offset, 0)


def test_extents_cover_the_range_in_order(device):
    device.write(b"x" * PAGE, 2 * PAGE)
    at = 700
    for extent in device.extents(700, SIZE - 700):
        assert extent.offset == at
        assert extent.length > 0
        at += extent.length
    assert at == SIZE


def test_read_into_needs_a_writable_buffer(device):
    with pytest.raises((BufferError, TypeError)):
        device.read_into(bytes(16), 0)


# ---- what only some kinds do ----


def test_failing_lower_fails_the_request_alone(pool):
    lower = plane.Injector(plane.Memory(4 << 20), pool)
    handler = Pages(lower, SIZE, pool)
    handler.map.write(b"a" * 512, 0)
    lower.set(fail=[Operation.WRITE], fail_code=-3)
    with pytest.raises(NoSpaceError):
        handler.map.write(b"b" * 512, 0)
    lower.set()
    assert handler.map.read(512, 0) == b"a" * 512
    handler.map.write(b"c" * 512, 0)
    handler.map.flush()
    handler.map.close()


def test_failed_barrier_poisons(pool):
    lower = plane.Injector(plane.Memory(4 << 20), pool)
    handler = Pages(lower, SIZE, pool)
    handler.map.write(b"a" * 512, 0)
    lower.set(fail=[Operation.FLUSH])
    with pytest.raises(HostIOError):
        handler.map.flush()
    lower.set()
    for _ in range(2):
        with pytest.raises(PoisonedError):
            handler.map.read(1, 0)
    handler.map.close()


def test_exception_of_a_handler_poisons_and_is_the_cause(pool):
    handler = Pages(plane.Memory(4 << 20), SIZE, pool)

    def broken(first, count):
        raise KeyError("a bug")

    handler.load = broken
    with pytest.raises(PoisonedError) as caught:
        handler.map.read(1, 0)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(PoisonedError):
        handler.map.read(1, 0)
    handler.map.close()


def test_refusal_of_a_handler_is_no_poison(pool):
    handler = Pages(plane.Memory(4 << 20), SIZE, pool)
    grant = handler.grant

    def full(wanted):
        raise NoSpaceError("the host is full", path="somewhere")

    handler.grant = full
    with pytest.raises(NoSpaceError, match="somewhere: the host is full"):
        handler.map.write(b"x", 0)
    handler.grant = grant
    handler.map.write(b"x", 0)
    handler.map.close()


def test_commit_is_asked_once_for_all_pages_and_never_without_any(pool):
    lower = plane.Memory(4 << 20)
    handler = Pages(lower, SIZE, pool)
    for page in range(5):
        handler.map.write(b"x", page * PAGE)
    handler.map.flush()
    assert sorted(handler.committed) == [0, 1, 2, 3, 4]
    before = handler.map.statistics()
    handler.map.write(b"y", 0)
    handler.map.flush()
    after = handler.map.statistics()
    assert after["commits"] == before["commits"] == 1
    assert after["rounds"] == before["rounds"] + 1
    handler.map.close()


def test_flush_covers_only_what_came_before_it_and_groups(pool):
    """Many threads write and flush: all are committed, in fewer rounds than flushes."""
    lower = plane.Injector(plane.Memory(4 << 20), pool)
    lower.set(park=[Operation.FLUSH], park_ns=2_000_000)
    handler = Pages(lower, SIZE, pool)
    errors = []

    def work(page):
        try:
            handler.map.write(b"x", page * PAGE)
            handler.map.flush()
            if page not in handler.committed:
                errors.append(page)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(page,)) for page in range(15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert handler.map.statistics()["rounds"] < 15
    handler.map.close()


def test_closed_map_refuses(pool):
    handler = Pages(plane.Memory(4 << 20), SIZE, pool)
    handler.map.write(b"x", 0)
    handler.map.close()
    with pytest.raises(ClosedError):
        handler.map.read(1, 0)
    with pytest.raises(ClosedError):
        handler.map.flush()


def test_read_only_file_refuses_changes(tmp_path):
    device = file_device(tmp_path, read_only=True)
    for change in (
        lambda: device.write(b"x", 0),
        lambda: device.zero(0, 1),
        lambda: device.trim(0, 1),
        lambda: device.resize(5),
    ):
        with pytest.raises(ReadOnlyError):
            change()
    device.flush()
    assert device.barriers == 0


def test_file_that_shrank_is_an_error_not_zeros(tmp_path):
    device = file_device(tmp_path)
    os.truncate(tmp_path / "leaf", 100)
    with pytest.raises(HostIOError) as caught:
        device.read(200, 0)
    assert caught.value.offset == 100


class _Second:
    """Puts every page at the second lower device."""

    def __init__(self, lowers, pool):
        self.map = plane.Map(self, SIZE, SIZE, PAGE, lowers, read_only=True, pool=pool, path="top")

    def load(self, first, count):
        where = np.arange(first, first + count, dtype=np.uint64) * np.uint64(PAGE)
        self.map.install(first, plane.entries(plane.Kind.DATA, 1, where, 0))


def test_an_error_names_the_file_that_failed(tmp_path, pool):
    (tmp_path / "other").mkdir()
    first = file_device(tmp_path, path="first")
    pages = _Second([first, file_device(tmp_path / "other", path="second")], pool)
    assert pages.map.read(10, 0) == bytes(10)
    os.truncate(tmp_path / "other" / "leaf", PAGE)
    with pytest.raises(HostIOError) as caught:
        pages.map.read(10, 3 * PAGE)
    assert (caught.value.path, caught.value.offset) == ("second", 3 * PAGE)
    with pytest.raises(RangeError) as caught:
        pages.map.read(10, SIZE)
    assert caught.value.path == "top"


def test_fast_zero_refuses_to_write(pool):
    class Slow(Bytes):
        def zero(self, offset, length):
            raise UnsupportedError("only by writing")

    device = plane.Callback(Slow(SIZE), SIZE)
    with pytest.raises(UnsupportedError):
        device.zero(0, 512, fast=True)


def test_handles_fail_in_a_forked_child(tmp_path):
    device = file_device(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            device.read(1, 0)
        except ClosedError as error:
            os._exit(0 if error.reason == "forked" else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert device.read(1, 0) == b"\0"


def test_memory_errors_of_os_have_their_number(tmp_path):
    fd = os.open(tmp_path / "leaf", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4096)
    device = plane.File(fd, 4096, read_only=False)
    with pytest.raises(NoSpaceError) as caught:
        device.resize((1 << 63) - 1)
    assert caught.value.errno == errno.ENOSPC


def test_stub_names_what_the_library_has():
    import ast
    from pathlib import Path

    stub = ast.parse((Path(plane.__file__).parent / "_native.pyi").read_text())
    body = next(n for n in stub.body if isinstance(n, ast.ClassDef)).body
    names = {n.name for n in body if isinstance(n, ast.FunctionDef)}
    names |= {n.target.id for n in body if isinstance(n, ast.AnnAssign)}
    assert names == set(dir(lib))
    assert ffi.sizeof("vx_extent") == 24


def test_a_failure_gives_the_callers_memory_back():
    """Else the garbage collector clears a memoryview that is lent out, and the process crashes."""
    small = plane.Memory(4096)
    kept = []
    for operation in (small.write, small.read_into):
        view = memoryview(bytearray(8192))
        with pytest.raises(RangeError) as caught:
            operation(view, 0)
        kept.append(caught.value)
        view.release()  # refused while it is lent out
