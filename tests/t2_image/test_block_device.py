# SPDX-License-Identifier: MIT
"""Block devices as a place: source and destination of every command, and what they cannot be."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys

import pytest

import vhdx
from vhdx.errors import (
    ExistsError,
    InUseError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    ReadOnlyError,
    UnsupportedError,
)
from vhdx.image.storage import share_storage
from vhdx.units import MIB

SIZE = 160 * MIB


@pytest.fixture
def device(tmp_path):
    """A loop device full of old data; gone at the end."""
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        for _ in range(SIZE // MIB):
            file.write(random.Random(5).randbytes(MIB))
    run = subprocess.run(
        ["losetup", "--find", "--show", backing], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        pytest.skip(f"no loop device: {run.stderr.strip()}")
    path = run.stdout.strip()
    yield path
    subprocess.run(["losetup", "--detach", path], check=True)


def content(path, format=None):
    with vhdx.open(path, format=format) as disk:
        return disk.pread(disk.size, 0)


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_an_image_on_a_device_shows_nothing_of_what_the_device_held(device, kind):
    size = 100 * MIB
    vhdx.create(device, size, type=kind, block_size=MIB, force=True)
    assert content(device) == bytes(size)
    expected = bytearray(size)
    rng = random.Random(1)
    with vhdx.open(device, "r+") as disk:
        for _ in range(200):
            offset, data = rng.randrange(size // 512 - 8) * 512, rng.randbytes(4096)
            disk.pwrite(data, offset)
            expected[offset : offset + 4096] = data
        disk.trim(0, 20 * MIB)
        expected[: 20 * MIB] = disk.pread(20 * MIB, 0)  # a trim may do nothing
        disk.flush()
        disk.compact()
    assert content(device) == expected
    assert not vhdx.check(device).errors
    with vhdx.open(device, "r+") as disk:
        disk.pwrite(b"again", 50 * MIB)
    assert content(device)[50 * MIB :][:5] == b"again"


def fill(disk) -> int:
    """Bytes that are written until the device is full."""
    for done in range(0, 2 * SIZE, MIB):
        try:
            disk.pwrite(b"x" * MIB, done)
        except NoSpaceError:
            return done
    return 2 * SIZE


def test_a_device_that_is_full_refuses_and_keeps_what_it_has(device):
    vhdx.create(device, 400 * MIB, block_size=MIB, force=True)
    with vhdx.open(device, "r+") as disk:
        done = fill(disk)
        assert 100 * MIB < done < SIZE
        with pytest.raises(NoSpaceError, match="block device has"):
            disk.pwrite(b"x", done)
        disk.flush()
        assert disk.pread(done, 0) == b"x" * done
        with pytest.raises(NoSpaceError):
            disk.pwrite(b"y", done)
        disk.trim(0, 10 * MIB)
        disk.flush()
        disk.pwrite(b"y" * MIB, done)  # what was trimmed is used again
    assert content(device)[10 * MIB : done + MIB] == b"x" * (done - 10 * MIB) + b"y" * MIB


def test_conversions_to_and_from_a_device(device, tmp_path):
    raw = tmp_path / "disk.raw"
    data = bytearray(100 * MIB)
    data[MIB : 3 * MIB] = os.urandom(2 * MIB)
    raw.write_bytes(data)
    with pytest.raises(ExistsError, match="block device"):
        vhdx.convert(raw, device)
    vhdx.convert(raw, device, force=True)  # a device gets a raw disk
    assert content(device, "raw")[: len(data)] == data
    vhdx.convert(device, tmp_path / "back.vhdx", format="raw")
    assert content(tmp_path / "back.vhdx")[: len(data)] == data
    vhdx.convert(raw, device, to="vhdx", block_size=MIB, force=True)
    assert content(device) == data
    vhdx.convert(device, tmp_path / "again.raw")
    assert (tmp_path / "again.raw").read_bytes() == data


def test_what_cannot_be_done_on_a_device_changes_nothing(device, tmp_path):
    raw = tmp_path / "large.raw"
    raw.touch()
    os.truncate(raw, 2 * SIZE)
    vhdx.create(device, 400 * MIB, block_size=MIB, force=True)
    with vhdx.open(device, "r+") as disk:
        disk.pwrite(b"kept", 0)
    with open(device, "rb") as file:
        before = file.read()
    with pytest.raises(NoSpaceError, match="cannot grow"):
        vhdx.convert(raw, device, force=True)
    with pytest.raises(NoSpaceError, match="cannot grow"):
        vhdx.create(device, 400 * MIB, type="fixed", force=True)
    with pytest.raises(UnsupportedError, match="footer"):
        vhdx.convert(raw, device, to="vhd", force=True)
    with vhdx.open(device, "r+") as disk, pytest.raises(UnsupportedError, match="block device"):
        disk.snapshot(tmp_path / "checkpoint.vhdx")
    with vhdx.open(device, "r+") as disk, pytest.raises(InUseError):
        vhdx.create(device, 100 * MIB, force=True)
    with open(device, "rb") as file:
        now = file.read()
    assert now[MIB:] == before[MIB:]  # the opens for writing changed headers
    assert content(device)[:4] == b"kept"
    child = tmp_path / "child.vhdx"
    vhdx.create(child, parent=device)
    with vhdx.open(child, "r+") as disk:
        disk.pwrite(b"new", 1)
    with pytest.raises(UnsupportedError, match="block device"):
        vhdx.merge(child)
    assert content(child)[:5] == b"knew\0"


def test_two_nodes_of_a_device_are_one_file(device, tmp_path):
    vhdx.create(device, 100 * MIB, force=True)
    other = tmp_path / "node"
    os.mknod(other, 0o600 | 0o060000, os.stat(device).st_rdev)
    with pytest.raises(vhdx.InvalidArgumentError, match="same file"):
        vhdx.convert(device, other, force=True)


@pytest.mark.parametrize("to", ["vhdx", "raw"])
def test_a_conversion_that_is_stopped_leaves_no_part_of_an_image(device, tmp_path, to):
    raw = tmp_path / "disk.raw"
    raw.write_bytes(random.Random(2).randbytes(90 * MIB))
    vhdx.create(device, 100 * MIB, force=True)
    calls = []

    def stop():
        calls.append(1)
        return len(calls) > 10

    with pytest.raises(vhdx.VhdxError, match="holds no image now"):
        vhdx.convert(raw, device, to=to, block_size=MIB, force=True, cancel=stop)
    with pytest.raises(UnsupportedError):
        vhdx.open(device)
    assert content(device, "raw")[:MIB] == bytes(MIB)


def test_what_a_device_held_is_not_taken_for_an_image_later(device, tmp_path):
    raw, old = tmp_path / "disk.raw", tmp_path / "old.vhd"
    raw.write_bytes(random.Random(2).randbytes(20 * MIB))
    vhdx.create(old, SIZE - 512, type="fixed")
    subprocess.run(["dd", f"if={old}", f"of={device}", "bs=1M", "status=none"], check=True)
    with vhdx.open(device) as disk:
        assert disk.size == SIZE - 512  # it is a VHD
    vhdx.convert(raw, device, to="vhdx", block_size=MIB, force=True)
    with vhdx.open(device) as disk:
        assert disk.size == 20 * MIB
    subprocess.run(["dd", f"if={old}", f"of={device}", "bs=1M", "status=none"], check=True)
    vhdx.convert(raw, device, force=True)
    with pytest.raises(UnsupportedError):
        vhdx.open(device)


def test_a_device_that_is_mounted_is_not_written(device, tmp_path, peer):
    peer("mkfs.ext4", "mount", "umount")
    subprocess.run(["mkfs.ext4", "-q", "-F", device], check=True)
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(["mount", device, mount], check=False).returncode != 0:
        pytest.skip("it cannot be mounted here")
    try:
        (mount / "file").write_bytes(b"kept")
        for call in (
            lambda: vhdx.create(device, 100 * MIB, force=True),
            lambda: vhdx.open(device, "r+", format="raw"),
        ):
            with pytest.raises(InUseError, match="mounted"):
                call()
        assert (mount / "file").read_bytes() == b"kept"
    finally:
        subprocess.run(["umount", mount], check=True)
    assert subprocess.run(["e2fsck", "-fn", device], check=False, capture_output=True).returncode == 0


@pytest.fixture
def other_node(device, tmp_path):
    """A second node of the device, as containers have them."""
    number = os.stat(device).st_rdev
    node = tmp_path / "node"
    os.mknod(node, 0o600 | stat.S_IFBLK, number)
    return str(node)


def test_a_second_node_of_a_device_is_the_same_device(device, other_node):
    vhdx.create(device, 20 * MIB, force=True)
    with vhdx.open(device, "r+"):
        for mode in ("r", "r+"):
            with pytest.raises(InUseError):
                vhdx.open(other_node, mode)
        with pytest.raises(InUseError):
            vhdx.create(other_node, 20 * MIB, force=True)
    with vhdx.open(other_node), pytest.raises(InUseError, match="in use by"):
        vhdx.open(device, "r+")


def test_source_and_destination_on_the_same_storage_are_refused(device, tmp_path):
    backing = tmp_path / "backing"
    vhdx.create(device, 20 * MIB, force=True)
    before = backing.read_bytes()
    second = subprocess.run(
        ["losetup", "--find", "--show", backing], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        for source, destination in [(device, second), (backing, device), (device, backing)]:
            with pytest.raises(InvalidArgumentError, match="same storage"):
                vhdx.convert(source, destination, to="vhdx", force=True, format="raw")
    finally:
        subprocess.run(["losetup", "--detach", second], check=True)
    assert backing.read_bytes() == before


def test_two_partitions_of_a_disk_are_two_storages(tmp_path):
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    script = "label: gpt\nsize=16MiB\nsize=16MiB\n"
    subprocess.run(["sfdisk", "-q", disk], input=script, text=True, check=True)
    path = subprocess.run(
        ["losetup", "-P", "--find", "--show", disk], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        if not os.path.exists(f"{path}p2"):
            pytest.skip("the kernel makes no nodes of partitions")
        assert share_storage(path, f"{path}p1")
        assert share_storage(f"{path}p2", path)
        assert share_storage(f"{path}p1", str(disk))
        assert not share_storage(f"{path}p1", f"{path}p2")
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)


def test_a_conversion_that_is_killed_leaves_no_image_on_a_device(device, tmp_path):
    raw = tmp_path / "disk.raw"
    with raw.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(MIB))
    code = (
        "import os, vhdx\n"
        f"vhdx.convert({str(raw)!r}, {device!r}, to='vhdx', force=True,"
        " progress=lambda done, total: os._exit(9) if done > total // 2 else None)\n"
    )
    for kind in ("dynamic", "fixed"):
        vhdx.create(device, 20 * MIB, force=True)
        run = subprocess.run(
            [sys.executable, "-c", code.replace("to=", f"type={kind!r}, block_size=1 << 20, to=")]
        )
        assert run.returncode == 9
        with pytest.raises(UnsupportedError, match="format is unknown"):
            vhdx.open(device)
    vhdx.convert(raw, device, to="vhdx", force=True)
    assert content(device) == raw.read_bytes()


def test_a_device_that_is_too_small_for_a_conversion_says_what_it_holds(device, tmp_path):
    raw = tmp_path / "large.raw"
    with raw.open("wb") as file:
        for _ in range(SIZE // MIB + 20):
            file.write(os.urandom(MIB))
    with pytest.raises(NoSpaceError, match="the block device holds no image now"):
        vhdx.convert(raw, device, to="vhdx", force=True)


def test_a_read_only_device_is_not_opened_for_writing(device):
    vhdx.create(device, 20 * MIB, force=True)
    subprocess.run(["blockdev", "--setro", device], check=True)
    try:
        with pytest.raises(ReadOnlyError, match="the block device is read-only"):
            vhdx.open(device, "r+")
        with pytest.raises(ReadOnlyError, match="the block device is read-only"):
            vhdx.create(device, 20 * MIB, force=True)
        vhdx.open(device).close()
    finally:
        subprocess.run(["blockdev", "--setrw", device], check=True)


def test_a_device_that_does_not_exist_is_not_made(device):
    with pytest.raises(NotFoundError, match="no such device"):
        vhdx.create("/dev/no-such-device.vhdx", 20 * MIB)
