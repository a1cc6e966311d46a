# SPDX-License-Identifier: MIT
"""Threads on one disk, and a close in the middle of them."""

from __future__ import annotations

import threading

import pytest

import vhdx
from vhdx import plane
from vhdx.image.vhdx.space import Space
from vhdx.units import GIB, MIB


@pytest.fixture
def path(fast_path):
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 32 * MIB, block_size=MIB)
    return path


def test_close_under_load_keeps_what_returned_and_fails_nothing_else(path):
    """Writers, trimmers and flushers run into a close: ClosedError for them, a clean image."""
    for _ in range(25):
        disk = vhdx.open(path, "r+")
        done: dict[int, bytes] = {}
        errors: list[BaseException] = []

        def work(me, disk=disk, done=done, errors=errors):
            try:
                for n in range(100_000):
                    block = me * 8 + n % 8
                    data = bytes([n % 255 + 1]) * 512
                    disk.pwrite(data, block * MIB)
                    done[block] = data
                    if me == 1 and n % 3 == 0:
                        done.pop(block)
                        disk.trim(block * MIB, MIB)
                    if me == 2:
                        disk.flush()
            except vhdx.ClosedError:
                done.pop(block, None)  # that one may be there or not
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
        for thread in threads:
            thread.start()
        threading.Event().wait(0.005)
        disk.close()
        for thread in threads:
            thread.join()
        assert errors == []
        with vhdx.open(path) as again:
            assert not again.describe()["log_dirty"]
            for block, data in done.items():
                assert again.pread(512, block * MIB) == data


def test_a_write_between_a_close_and_its_end_finds_it_closed(path, monkeypatch):
    """The engine gives no space any more, and the map does not refuse yet."""
    disk = vhdx.open(path, "r+")
    disk.pwrite(b"gate", 0)
    device = disk._device
    outcome: list[BaseException] = []
    close = plane.Map.close

    def late(self):
        self.revoke()  # as if others had used up what was ready
        with pytest.raises(vhdx.ClosedError) as caught:
            device.write(b"late", MIB)
        outcome.append(caught.value)
        close(self)

    monkeypatch.setattr(plane.Map, "close", late)
    disk.close()
    assert len(outcome) == 1


def test_many_threads_on_disjoint_ranges(path):
    size = 32 * MIB

    def work(me):
        for n in range(300):
            offset = (n * 8 + me) * 4096 * 3 % (size - 4096) // 4096 * 4096
            if offset // 4096 % 8 != me:
                continue
            disk.pwrite(bytes([me + 1]) * 4096, offset)
            assert disk.pread(4096, offset) == bytes([me + 1]) * 4096

    with vhdx.open(path, "r+") as disk:
        threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_vectors_take_iterators_and_never_go_short(path):
    with vhdx.open(path, "r+") as disk:
        assert disk.pwritev((part for part in (b"abc", b"def")), 0) == 6
        assert disk.pread(6, 0) == b"abcdef"
        with pytest.raises(vhdx.RangeError):
            disk.pwritev([b"XY", b"Z"], disk.size - 2)
        assert disk.pread(2, disk.size - 2) == b"\0\0"
        with pytest.raises(vhdx.RangeError) as caught:
            list(disk.extents(disk.size + 1))
        assert caught.value.offset == disk.size + 1


def test_a_disk_that_nobody_closed_is_let_go(path):
    disk = vhdx.open(path, "r+")
    disk.pwrite(b"flushed", 0)
    disk.flush()
    with pytest.warns(ResourceWarning, match="unclosed disk"):
        del disk
    with vhdx.open(path) as disk:
        assert disk.pread(7, 0) == b"flushed"


def test_entries_are_loaded_while_space_is_prepared(tmp_path, monkeypatch):
    """A slow host that zeroes blocks for a write holds up nobody who reads."""
    path = tmp_path / "disk.vhdx"
    vhdx.create(path, 64 * GIB, block_size=MIB)  # BAT entries of many chunks
    began, go_on = threading.Event(), threading.Event()
    prepare = Space.prepare

    def slow(self, reservation):
        began.set()
        assert go_on.wait(60)
        prepare(self, reservation)

    monkeypatch.setattr(Space, "prepare", slow)
    with vhdx.open(path, "r+") as disk:
        writer = threading.Thread(target=disk.pwrite, args=(b"x", 0))
        writer.start()
        assert began.wait(60)
        reader = threading.Thread(target=disk.pread, args=(10, 32 * GIB))
        reader.start()
        reader.join(30)
        stalled = reader.is_alive()
        go_on.set()
        writer.join()
        reader.join()
        assert not stalled
        assert disk.pread(1, 0) == b"x"
