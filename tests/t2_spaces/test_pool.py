# SPDX-License-Identifier: MIT
"""Pools of real files: what is refused, what is recognised, volumes, and images on them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys

import pytest

import vhdx
from tests.disk_place import DiskPlace
from vhdx.errors import (
    DamagedError,
    ExistsError,
    HostIOError,
    InUseError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    Reason,
)
from vhdx.plane import Operation
from vhdx.spaces import DiskSpec, Pool, Provisioning, Resiliency
from vhdx.volume import list_files, remove_file, rename_file
from vhdx.volume.copying import copy_file

KIB, MIB = 1 << 10, 1 << 20
SLAB = MIB


@pytest.fixture(autouse=True)
def _hints(tmp_path, monkeypatch):
    monkeypatch.setenv("VHDX_POOLS", str(tmp_path / "pools"))


@pytest.fixture
def make(tmp_path):
    """Makes closed pools of sparse files."""

    def make(name="p", disks=5, size=64 * MIB, **settings) -> list[str]:
        paths = [str(tmp_path / f"{name}{i}.img") for i in range(disks)]
        specs = [DiskSpec(f"d{i}", path, size) for i, path in enumerate(paths)]
        Pool.create(name, specs, **({"slab": SLAB} | settings)).close()
        return paths

    return make


def fill(name: str, space: str, seed: int = 1) -> bytes:
    """Random content of a whole space."""
    with Pool.open(name) as pool, pool.lease(space) as device:
        content = random.Random(seed).randbytes(device.size)
        device.write(content, 0)
        device.flush()
    return content


def content(name: str, space: str, **how) -> bytes:
    with Pool.open(name, **how) as pool, pool.lease(space) as device:
        return device.read(device.size, 0)


def space_in(name: str, space: str = "s", size: int = 8 * MIB, **terms) -> None:
    with Pool.open(name) as pool:
        pool.create_space(space, size, **terms)


def test_a_pool_is_found_in_any_order_and_under_any_path(make, tmp_path):
    paths = make()
    space_in("p", copies=2)
    expected = fill("p", "s")
    moved = []
    for path in reversed(paths):
        moved.append(str(tmp_path / f"moved-{os.path.basename(path)}"))
        os.rename(path, moved[-1])
    with pytest.raises(NotFoundError):
        Pool.open("p")
    assert content(None, "s", disks=moved) == expected
    assert content("p", "s") == expected  # where they are was noted


def test_two_processes_cannot_have_a_pool(make):
    paths = make()
    with Pool.open("p"):
        for mode in ("r", "r+"):
            with pytest.raises(InUseError, match="this process"):
                Pool.open("p", mode)
        code = f"import vhdx; vhdx.Pool.open('p', disks={paths!r})"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "InUseError" in run.stderr
        assert f"process {os.getpid()}" in run.stderr


def test_foreign_disks_and_copies_are_refused(make, tmp_path):
    mine, other = make("p"), make("other")
    with pytest.raises(InvalidArgumentError, match="2 pools"):
        Pool.open(disks=[*mine, other[0]])
    copy = tmp_path / "copy.img"
    shutil.copy(mine[0], copy)
    with pytest.raises(DamagedError, match="are both disk 'd0'"):
        Pool.open(disks=[*mine, copy])
    with pytest.raises(ExistsError, match="there is a pool 'p' already"):
        make("p")
    with pytest.raises(ExistsError, match="it is disk 'd0' of pool 'p'"):
        Pool.create("q", [DiskSpec("x", mine[0])])
    (tmp_path / "file").write_bytes(os.urandom(64 * MIB))
    with pytest.raises(ExistsError, match="it holds data"):
        Pool.create("q", [DiskSpec("x", tmp_path / "file")], slab=SLAB)


def test_new_names(make):
    make("p"), make("q")
    space_in("p", copies=2)
    space_in("p", "t", copies=2)
    expected = fill("p", "s")
    with Pool.open("p") as pool:
        with pytest.raises(ExistsError, match="there is a pool 'q' already"):
            pool.rename("q")
        with pytest.raises(ExistsError, match="there is a space 't' already"):
            pool.rename_space("s", "t")
        with pytest.raises(InvalidArgumentError):
            pool.rename_space("s", "a/b")
        with pool.lease("s"):
            with pytest.raises(InUseError):
                pool.rename("r")
            with pytest.raises(InUseError):
                pool.rename_space("s", "u")
        pool.rename("r")
        pool.rename_space("s", "u")
        assert (pool.name, pool.space_names()) == ("r", ["u", "t"])
    with pytest.raises(NotFoundError):
        Pool.open("p")
    assert content("r", "u") == expected


def test_what_a_new_pool_cannot_be(tmp_path):
    fit = DiskSpec("a", tmp_path / "a", 64 * MIB)
    cases = [
        ([], {}, InvalidArgumentError),
        ([fit, DiskSpec("a", tmp_path / "b", 64 * MIB)], {}, InvalidArgumentError),
        ([fit, DiskSpec("b", tmp_path / "a", 64 * MIB)], {}, InvalidArgumentError),
        ([fit], {"slab": 3 * MIB}, InvalidArgumentError),
        ([fit], {"slab": 4096}, InvalidArgumentError),
        ([fit, DiskSpec("b", tmp_path / "b", MIB)], {}, NoSpaceError),
        ([fit, DiskSpec("b", tmp_path / "no" / "b", 64 * MIB)], {}, NotFoundError),
    ]
    for specs, settings, error in cases:
        with pytest.raises(error):
            Pool.create("p", specs, **({"slab": SLAB} | settings))
        assert os.listdir(tmp_path) == []
    with pytest.raises(InvalidArgumentError, match="cannot be named"):
        Pool.create("a/b", [fit])


def test_what_a_new_space_cannot_be(make):
    make(disks=3)
    with Pool.open("p") as pool:
        for terms, match in [
            ({"columns": 2}, "needs 4 disks, and 3 can be used; add 1 disk"),
            ({"copies": 4}, "2 or 3 copies"),
            ({"interleave": 3000}, "interleave"),
            ({"resiliency": Resiliency.SIMPLE, "columns": 4}, "needs 4 disks"),
            ({"resiliency": Resiliency.SIMPLE, "copies": 2}, "one copy"),
        ]:
            with pytest.raises(InvalidArgumentError, match=match):
                pool.create_space("s", 8 * MIB, **terms)
        for size in (0, 100, -4096, 1 << 60):
            with pytest.raises(InvalidArgumentError):
                pool.create_space("s", size)
        with pytest.raises(NoSpaceError):
            pool.create_space("s", 1 << 30, provisioning=Provisioning.FIXED)
        assert pool.space_names() == []
        assert all(disk.used_slabs == 0 for disk in pool.report().disks)
        pool.create_space("s", 8 * MIB)
        with pytest.raises(ExistsError):
            pool.create_space("s", 8 * MIB)


def test_without_a_majority_a_pool_does_not_open(make):
    paths = make(disks=4)
    os.unlink(paths[0])
    Pool.open("p").close()
    os.unlink(paths[1])
    with pytest.raises(HostIOError, match="2 of 4") as caught:
        Pool.open("p")
    assert caught.value.reason is Reason.NO_QUORUM


def test_metadata_damaged_on_a_minority_are_restored_and_on_a_majority_refused(make):
    paths = make()
    space_in("p", copies=2)
    expected = fill("p", "s")

    def damage(path):
        with open(path, "r+b") as file:
            file.seek(64 * KIB)
            file.write(os.urandom(128 * KIB))

    damage(paths[1])
    with Pool.open("p") as pool:
        assert pool.settle()
        assert pool.report().disks[1].status == "OK"
        assert pool.scrub().different == 0
    assert content("p", "s") == expected
    for path in paths[:3]:
        damage(path)
    with pytest.raises(HostIOError, match="2 of 5"):
        Pool.open("p")


def test_a_truncated_disk_is_missing(make):
    paths = make()
    space_in("p", copies=2)
    expected = fill("p", "s")
    os.truncate(paths[2], 10 * MIB)
    with Pool.open("p") as pool:
        assert "truncated" in str(pool.problems[paths[2]])
        assert pool.report().disks[2].status == "Lost communication"
    assert content("p", "s") == expected


def test_an_old_copy_of_a_disk_is_never_read(make, tmp_path):
    paths = make(disks=3)
    space_in("p", copies=2, columns=1)
    fill("p", "s", seed=1)
    old = tmp_path / "old"
    shutil.copy(paths[0], old)
    expected = fill("p", "s", seed=2)
    shutil.copy(old, paths[0])
    with Pool.open("p") as pool:
        with pool.lease("s") as device:
            assert device.read(device.size, 0) == expected
        assert pool.settle()
        assert "stale-metadata" not in pool.report().disks[0].status
        events = [event.text for event in pool.report().events]
        assert any("lacks changes" in text for text in events)
        assert pool.scrub().different == 0
        with pool.lease("s") as device:
            assert device.read(device.size, 0) == expected


def test_an_old_copy_of_a_disk_of_a_simple_space_is_never_read(make, tmp_path):
    """Also when nothing but data was changed since, and the pool was not closed."""
    paths = make(disks=3)
    space_in("p", resiliency=Resiliency.SIMPLE, columns=3)
    fill("p", "s", seed=1)
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copy(paths[0], old)
    pool = Pool.open("p")
    expected = random.Random(2).randbytes(8 * MIB)
    with pool.lease("s") as device:
        device.write(expected, 0)
        device.flush()
        pool.abandon()
    os.rename(paths[0], new)
    for mode in ("r", "r+"):
        shutil.copy(old, paths[0])
        with Pool.open("p", mode) as pool:
            assert not pool.report().spaces[0].attached
    os.replace(new, paths[0])
    assert content("p", "s") == expected


def test_a_simple_space_without_a_disk_is_detached_and_comes_back(make):
    paths = make(disks=5)
    space_in("p", resiliency=Resiliency.SIMPLE, columns=4)
    expected = fill("p", "s")
    os.rename(paths[0], paths[0] + ".away")
    with Pool.open("p") as pool:
        report = pool.report().spaces[0]
        assert (report.status, report.attached) == ("Detached", False)
        with pytest.raises(vhdx.VhdxError, match="detached: "), pool.lease("s"):
            pass
        os.rename(paths[0] + ".away", paths[0])
        assert pool.settle()
        assert pool.report().spaces[0].attached
        with pool.lease("s") as device:
            assert device.read(device.size, 0) == expected
    assert content("p", "s") == expected


def test_what_fails_at_the_opening_lets_go_of_the_disks(make, monkeypatch):
    make(disks=3)
    space_in("p", copies=2, columns=1)
    expected = fill("p", "s")

    def fails(*_arguments):
        raise HostIOError("it failed")

    with monkeypatch.context() as patch:
        patch.setattr("vhdx.spaces.pool_spaces.attach_spaces", fails)
        with pytest.raises(HostIOError, match="it failed"):
            Pool.open("p")
    with monkeypatch.context() as patch:
        patch.setattr("vhdx.spaces.hints.write_hint", fails)
        with pytest.raises(HostIOError, match="it failed"):
            make("q", disks=3)
    assert content("p", "s") == expected


def test_a_scrub_goes_on_without_a_disk_that_fails():
    place = DiskPlace({f"d{i}": bytes(4 * MIB) for i in range(4)})
    specs = [DiskSpec(name, path) for name, path in zip(place.keys, place.paths(), strict=True)]
    with Pool.create("p", specs, slab=64 * KIB, known=False) as pool:
        pool.create_space("s", 512 * KIB, copies=3, columns=1)
        with pool.lease("s") as device:
            device.write(os.urandom(device.size), 0)
            device.flush()
            place.hold("d1").set(fail=[Operation.READ])
            found = pool.scrub()
            assert (found.different, found.unread, found.compared) == (0, 0, 512 * KIB)
            assert pool.report().disks[1].status == "IO error"
            others = [place.hold(name) for name in ("d0", "d2", "d3")]
            for hold in others:
                hold.set(fail=[Operation.READ])
            found = pool.scrub()
            assert found.unread == 512 * KIB
            assert "could not be compared" in found.text
            for hold in others:
                hold.set()


def test_scrub_finds_and_repairs_what_two_of_three_say(make):
    paths = make(disks=6)
    space_in("p", "three", copies=3, columns=1)
    space_in("p", "two", copies=2, columns=1)
    expected = {name: fill("p", name, seed) for seed, name in enumerate(["three", "two"])}
    with Pool.open("p") as pool:
        assert pool.scrub().different == 0
    garbage = os.urandom(4096)
    with open(paths[0], "r+b") as file:  # its first slabs belong to one of the spaces, or both
        for at in range(8 * MIB, 12 * MIB, MIB):
            file.seek(at + 64 * KIB)
            file.write(garbage)
    with Pool.open("p") as pool:
        found = pool.scrub()
        assert found.different == 4
        assert all(each.disks == ["d0"] for each in found.differences if not each.is_tie)
        fixed = pool.scrub(repair=True)
        assert fixed.repaired == found.different - found.ties
        again = pool.scrub()
        assert (again.different, again.ties) == (found.ties, found.ties)
    assert content("p", "three") == expected["three"]


def test_a_space_becomes_larger_and_is_deleted(make):
    make()
    space_in("p", copies=2)
    expected = fill("p", "s")
    with Pool.open("p") as pool:
        with pool.lease("s") as device:
            pool.resize_space("s", 20 * MIB)
            assert device.size == 20 * MIB
            assert device.read(20 * MIB, 0) == expected + bytes(12 * MIB)
            device.write(b"end", 20 * MIB - 3)
            with pytest.raises(InUseError):
                pool.delete_space("s")
        with pytest.raises(InvalidArgumentError, match="cannot become smaller"):
            pool.resize_space("s", MIB)
        pool.delete_space("s")
        assert all(disk.used_slabs == 0 for disk in pool.report().disks)
        pool.create_space("new", 8 * MIB, provisioning=Provisioning.FIXED)
        with pool.lease("new") as device:
            assert device.read(8 * MIB, 0) == bytes(8 * MIB)  # nothing of the old space shows


# ---- volumes ----


@pytest.fixture
def volume(make):
    make(size=256 * MIB)
    space_in("p", size=200 * MIB, copies=2, columns=2)
    return "space://p/s"


def test_files_of_a_volume(volume, tmp_path):
    source = tmp_path / "file"
    data = os.urandom(5 * MIB + 123)
    source.write_bytes(data)
    assert copy_file(source, f"{volume}/a") == len(data)
    with pytest.raises(ExistsError):
        copy_file(source, f"{volume}/a")
    copy_file(f"{volume}/a", f"{volume}/b")
    copy_file(f"{volume}/b", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    rename_file(f"{volume}/b", f"{volume}/c")
    with pytest.raises(ExistsError):
        rename_file(f"{volume}/c", f"{volume}/a")
    rename_file(f"{volume}/c", f"{volume}/a", force=True)
    assert [(each.name, each.size) for each in list_files(volume)] == [("a", len(data))]
    remove_file(f"{volume}/a")
    assert list_files(volume) == []
    for call in (
        lambda: remove_file(f"{volume}/a"),
        lambda: copy_file(f"{volume}/a", tmp_path / "x"),
        lambda: list_files("space://p/nosuch"),
        lambda: list_files("space://nosuch/s"),
        lambda: vhdx.open(f"{volume}/a.vhdx"),
    ):
        with pytest.raises((NotFoundError, FileNotFoundError)):
            call()
    for call in (
        lambda: vhdx.create(f"{volume}/a/b.vhdx", MIB),
        lambda: rename_file(f"{volume}/a", "space://p/other/a"),
        lambda: list_files(str(tmp_path)),
    ):
        with pytest.raises(InvalidArgumentError):
            call()


def test_images_on_a_volume(volume, tmp_path):
    """Every operation, against a copy in memory; the space that is given up is free again."""
    image = f"{volume}/disk.vhdx"
    vhdx.create(image, 40 * MIB, block_size=MIB)
    expected = bytearray(40 * MIB)
    rng = random.Random(7)

    def change():
        with vhdx.open(image, "r+") as disk:
            for _ in range(60):
                offset = rng.randrange(len(expected))
                part = rng.randbytes(min(len(expected) - offset, rng.choice([1, 4096, 300_000])))
                disk.pwrite(part, offset)
                expected[offset : offset + len(part)] = part
            disk.trim(10 * MIB, 5 * MIB)
            disk.flush()
            expected[10 * MIB : 15 * MIB] = disk.pread(5 * MIB, 10 * MIB)

    change()
    checkpoint = vhdx.snapshot(image)
    change()
    vhdx.merge(image)
    assert os.path.basename(checkpoint) not in [each.name for each in list_files(volume)]
    vhdx.resize(image, 50 * MIB)
    expected.extend(bytes(10 * MIB))
    change()
    vhdx.compact(image)
    assert not vhdx.check(image).errors
    raw = tmp_path / "disk.raw"
    vhdx.convert(image, raw)
    assert raw.read_bytes() == expected
    vhdx.convert(raw, f"{volume}/again.vhdx", block_size=MIB)
    with vhdx.open(f"{volume}/again.vhdx") as disk:
        assert disk.pread(disk.size, 0) == expected
    with pytest.raises(NoSpaceError):  # noqa: PT012 - the volume is full, and loses nothing
        for number in range(20):
            copy_file(raw, f"{volume}/{number}")
    assert [each.name for each in list_files(volume)][-2:] == ["again.vhdx", "disk.vhdx"]
    with vhdx.open(image) as disk:
        assert disk.pread(disk.size, 0) == expected
    for each in list_files(volume):
        remove_file(f"{volume}/{each.name}")
    copy_file(raw, f"{volume}/one")


def test_a_raw_space_is_a_disk(make):
    make(size=256 * MIB)
    space_in("p", "raw", 60 * MIB, has_volume=False)
    with pytest.raises(ExistsError):
        vhdx.create("space://p/raw", 40 * MIB, block_size=MIB)
    vhdx.create("space://p/raw", 40 * MIB, block_size=MIB, force=True)
    with vhdx.open("space://p/raw", "r+") as disk:
        disk.pwrite(b"hello", 30 * MIB)
        with pytest.raises(InUseError):
            vhdx.open("space://p/raw")
    with vhdx.open("space://p/raw", format="raw") as disk:
        assert disk.size == 60 * MIB
    with vhdx.open("space://p/raw") as disk:
        assert disk.pread(5, 30 * MIB) == b"hello"
