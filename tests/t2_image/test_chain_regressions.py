# SPDX-License-Identifier: MIT
"""What reviewers broke chains, sizes and compaction with, once."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

import vhdx
from tests.images import edit
from vhdx import plane
from vhdx.image import lock
from vhdx.image.vhdx import compacting, loader, snapshots
from vhdx.units import GIB, MIB, TIB


@pytest.fixture
def path(fast_path):
    found = fast_path / "disk.vhdx"
    vhdx.create(found, 16 * MIB, block_size=MIB)
    with vhdx.open(found, "r+") as disk:
        disk.pwrite(b"base" * 1024, 0)
    return found


def content(path):
    with vhdx.open(path) as disk:
        return disk.pread(disk.size, 0)


def test_sector_bitmaps_after_a_shrink_are_placed_again(path, fast_path):
    child = fast_path / "child.vhdx"
    vhdx.create(child, parent=path, block_size=MIB)
    with vhdx.open(child, "r+") as disk:
        for _ in range(2):
            disk.resize(10 * GIB)
            disk.pwrite(b"x" * 512, 5 * GIB)
            disk.flush()
            disk.resize(64 * MIB, shrink=True, unsafe=True)
        disk.resize(10 * GIB)
        disk.pwrite(b"y" * 512, 5 * GIB)
    with vhdx.open(child) as disk:
        assert disk.pread(512, 5 * GIB) == b"y" * 512


def test_trims_and_shrinks_do_not_wait_for_each_other(path):
    stop, failures = threading.Event(), []
    with vhdx.open(path, "r+") as disk:

        def trim():
            try:
                while not stop.is_set():
                    disk.trim(2 * MIB, 2 * MIB)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=trim, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for step in range(40):
            disk.resize((20 + step % 3) * MIB, shrink=True, unsafe=True)
        stop.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert failures == []


def test_one_change_of_the_structure_at_a_time(path, fast_path):
    refused = []
    with vhdx.open(path, "r+") as disk:

        def during(done, total):
            for change in (lambda: disk.snapshot(fast_path / "s.vhdx"), disk.compact, disk.close):
                try:
                    change()
                except vhdx.InUseError as error:
                    refused.append(error)

        disk.compact(progress=during)
        assert len(refused) >= 3
        disk.pwrite(b"still", 0)
        disk.snapshot(fast_path / "s.vhdx")
        disk.pwrite(b"child", 0)
    assert content(path)[:5] == b"child"
    assert content(fast_path / "s.vhdx")[:5] == b"still"


def test_an_interrupt_after_the_rename_keeps_the_checkpoint(path, fast_path, monkeypatch):
    before = content(path)

    def interrupted(self, target):
        os.replace(self, target)
        raise KeyboardInterrupt

    with vhdx.open(path, "r+") as disk:
        monkeypatch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            disk.snapshot(fast_path / "s.vhdx")
        monkeypatch.undo()
    assert (fast_path / "s.vhdx").exists()
    assert content(path) == before


def test_a_snapshot_is_of_the_open_file_whatever_its_name_is(path, fast_path, monkeypatch):
    other = fast_path / "elsewhere"
    other.mkdir()
    vhdx.create(other / "disk.vhdx", 4 * MIB)
    monkeypatch.chdir(fast_path)
    with vhdx.open("disk.vhdx", "r+") as disk:
        monkeypatch.chdir(other)
        disk.snapshot(fast_path / "s.vhdx")
        path.rename(fast_path / "moved.vhdx")
        with pytest.raises(vhdx.HostIOError, match="lost its name"):
            disk.snapshot(fast_path / "t.vhdx")
        vhdx.create(path, 4 * MIB)
        with pytest.raises(vhdx.HostIOError, match="another file"):
            disk.snapshot(fast_path / "t.vhdx")
    assert sorted(p.name for p in other.iterdir()) == ["disk.vhdx"]


def test_a_checkpoint_that_would_lose_its_parent_is_refused(path, fast_path):
    vhdx.snapshot(path)
    (fast_path / "away").mkdir()
    with pytest.raises(vhdx.InvalidArgumentError, match="own parent"):
        vhdx.snapshot(path, fast_path / "away" / "s.vhdx")


def test_images_opened_through_symbolic_links(path, fast_path):
    links = fast_path / "links"
    links.mkdir()
    (links / "disk.vhdx").symlink_to(path)
    name = vhdx.snapshot(links / "disk.vhdx")
    assert Path(name).parent == fast_path
    wanted = content(path)
    assert content(links / "disk.vhdx") == wanted
    vhdx.merge(links / "disk.vhdx")
    assert content(path) == content(links / "disk.vhdx") == wanted
    assert not path.is_symlink()


def test_a_merge_that_is_refused_leaves_an_interrupted_one_alone(path, fast_path):
    vhdx.snapshot(path, fast_path / "base.vhdx")
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"new" * 4096, 3 * MIB)
    with pytest.raises(vhdx.VhdxError):
        vhdx.merge(path, cancel=lambda: True)
    with vhdx.open(path, "r+") as disk:  # changes the DataWriteGuid that the parent has by now
        disk.pwrite(b"newer" * 4096, 5 * MIB)
    wanted = content(path)
    vhdx.create(fast_path / "sibling.vhdx", parent=fast_path / "base.vhdx")
    with pytest.raises(vhdx.InUseError):
        vhdx.merge(path)
    assert content(path) == wanted
    vhdx.merge(path, force=True)
    assert content(path) == wanted


def test_nobody_writes_an_image_while_it_is_merged(path, fast_path, monkeypatch):
    vhdx.snapshot(path, fast_path / "base.vhdx")
    seen = []

    def try_it(*arguments):
        with pytest.raises(vhdx.InUseError):
            vhdx.open(path, "r+")
        seen.append(1)
        os.rename(*arguments)

    monkeypatch.setattr(os, "replace", try_it)
    vhdx.merge(path)
    assert seen


def test_a_child_does_not_replace_what_it_is_based_on(path, fast_path):
    middle = fast_path / "middle.vhdx"
    vhdx.create(middle, parent=path)
    for target in (path, middle):
        with pytest.raises(vhdx.InvalidArgumentError, match="own parent"):
            vhdx.create(target, parent=middle, force=True)
    assert content(middle)[:4] == b"base"


def test_a_parent_is_guarded_under_its_other_names(path, fast_path):
    vhdx.create(fast_path / "child.vhdx", parent=path)
    os.link(path, fast_path / "second.vhdx")
    with pytest.raises(vhdx.InUseError):
        vhdx.open(fast_path / "second.vhdx", "r+")


def test_names_that_no_locator_can_hold(fast_path):
    for name in ("back\\slash.vhdx", os.fsdecode(b"\xff.vhdx")):
        vhdx.create(fast_path / name, 4 * MIB)
        with pytest.raises(vhdx.InvalidArgumentError, match="cannot be written"):
            vhdx.create(fast_path / "child.vhdx", parent=fast_path / name)
    with pytest.raises(vhdx.VhdxError):
        vhdx.snapshot(fast_path / name, "nul\0")


def test_check_sees_what_an_open_refuses(path, fast_path):
    child = fast_path / "child.vhdx"
    vhdx.create(child, parent=path)
    edit(child, 2 * MIB + 65536 + 40, b"\xff" * 16)  # the type of the locator
    assert {f.code for f in vhdx.check(child).findings} == {"parent_locator"}


def test_zero_to_the_end_while_the_disk_grows(fast_path):
    """The last block was shorter when the zeros were asked for; what it got since stays."""
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 2 * MIB + 4096, block_size=MIB)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"a" * 4096, 2 * MIB)
        engine = disk._image.engine
        real, wrote = engine.change_range, []

        def late(operation, first, count, size):
            if not wrote:
                wrote.append(1)
                disk.resize(4 * MIB)
                disk.pwrite(b"new", 2 * MIB + 8192, fua=True)
            real(operation, first, count, size)

        engine.change_range = late
        disk.zero(0, 2 * MIB + 4096)
        assert disk.pread(3, 2 * MIB + 8192) == b"new"
        assert disk.pread(2 * MIB + 4096, 0) == bytes(2 * MIB + 4096)


def test_a_trim_that_comes_late_leaves_the_checkpoint_alone(path, fast_path):
    with vhdx.open(path, "r+") as disk:
        engine = disk._image.engine
        real, taken = engine.change_range, []

        def late(*arguments):
            if not taken:
                taken.append(disk.snapshot(fast_path / "s.vhdx"))
            real(*arguments)

        engine.change_range = late
        disk.zero(0, MIB)
        assert disk.pread(4, 0) == bytes(4)
    assert content(fast_path / "s.vhdx")[:4] == b"base"
    assert content(path)[:4] == bytes(4)


def test_snapshots_module_names_are_free(path):
    first = snapshots.checkpoint_path(os.fspath(path), None)
    first.touch()
    assert snapshots.checkpoint_path(os.fspath(path), None) != first


def test_a_checkpoint_that_a_kill_left_behind_is_taken_up(path, fast_path):
    os.link(path, fast_path / "s.vhdx")
    vhdx.snapshot(path, fast_path / "s.vhdx")
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"after", 0)
    assert content(fast_path / "s.vhdx")[:4] == b"base"
    with pytest.raises(vhdx.InvalidArgumentError, match="raw"):
        vhdx.snapshot(path, fast_path / "t.raw")


def test_a_name_that_changes_hands_before_the_lock(path, fast_path, monkeypatch):
    """The writer gets the file that has the name when it is locked."""
    real, once = lock.acquire, []

    def late(fd, name, *, write):
        if not once and write:
            once.append(1)
            vhdx.snapshot(path, fast_path / "s.vhdx")
        real(fd, name, write=write)

    monkeypatch.setattr(lock, "acquire", late)
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"head", 0)
    assert content(fast_path / "s.vhdx")[:4] == b"base"
    assert content(path)[:4] == b"head"


def test_children_of_any_name_guard_their_parent(path, fast_path):
    vhdx.create(fast_path / "child.disk", parent=path)
    with pytest.raises(vhdx.InUseError, match=r"child\.disk"):
        vhdx.open(path, "r+")


def test_check_looks_for_the_parents(path, fast_path):
    child = fast_path / "child.vhdx"
    vhdx.create(child, parent=path)
    assert vhdx.check(child).findings == []
    path.unlink()
    assert [f.code for f in vhdx.check(child).findings] == ["parent_missing"]
    assert vhdx.check(child).errors == 0


def test_a_chunk_that_is_dropped_during_a_compaction(fast_path, monkeypatch):
    """Its blocks are loaded again, and the place of a live one is not given away."""
    monkeypatch.setattr(loader, "_RESIDENT_CHUNKS", 8)
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 8 * GIB, block_size=MIB)
    at = 8 * GIB - 100 * MIB
    with vhdx.open(path, "r+") as disk:
        disk.pwrite(b"A" * MIB, 0)
        disk.pwrite(b"B" * MIB, at)
        disk.trim(0, MIB)
        disk.flush()
        real = compacting._Compaction._copy

        def copy(self, source, target):
            real(self, source, target)
            for i in range(12):  # a guest reads elsewhere: chunks are dropped
                disk.pread(512, i * 512 * MIB)

        monkeypatch.setattr(compacting._Compaction, "_copy", copy)
        disk.compact()
        for i in range(80):
            disk.pwrite(bytes([97 + i % 20]) * MIB, GIB + i * MIB)
        disk.flush()
        assert disk.pread(MIB, at) == b"B" * MIB
    with vhdx.open(path, "r+") as disk:
        assert disk.pread(MIB, at) == b"B" * MIB


def test_a_host_that_is_full_while_a_log_entry_is_applied(fast_path):
    """What is in the log counts after the next open; until then nobody goes on with the old table."""
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 64 * GIB, block_size=MIB)
    disk = vhdx.open(path, "r+")
    disk.pwrite(b"1" * 4096, 0)
    disk.flush()
    leaf = disk._image.engine.committer.journal._leaf

    class Full:
        def __getattr__(self, name):
            return getattr(leaf, name)

        def batch(self, steps):
            last = steps[-1]
            if last.operation != plane.Operation.WRITE or last.offset < 2 * MIB:
                return leaf.batch(steps)  # the log and the headers; not what is applied
            leaf.batch(steps[:-1])
            raise vhdx.NoSpaceError("injected", path=path)

    disk._image.engine.committer.journal._leaf = Full()
    with pytest.raises(vhdx.NoSpaceError):
        disk.resize(4 * TIB)
    with pytest.raises(vhdx.PoisonedError):
        disk.pwrite(b"2" * 4096, 10 * GIB, fua=True)
    with pytest.raises(vhdx.PoisonedError):
        disk.close()
    with vhdx.open(path) as disk:
        assert disk.size in {64 * GIB, 4 * TIB}
        assert disk.pread(4096, 0) == b"1" * 4096
