# SPDX-License-Identifier: MIT
"""What is written into a mounted image is in the image, and reading changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

import vhdx
from tests.t4_cli.command import VHDX, run
from tests.t4_cli.test_readme import commands, type_all
from tests.t5_mount.disks import (
    SIZE,
    START,
    digest,
    do,
    fill,
    make_disk,
    make_filesystem,
    make_image,
    read_elsewhere,
    read_tree,
)
from vhdx import mounting
from vhdx.units import MIB


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("ext4", None),
        ("ext4", "gpt"),
        ("xfs", None),
        ("xfs", "dos"),
        ("btrfs", None),
        ("btrfs", "gpt"),
        ("ntfs", None),
        ("ntfs", "dos"),
    ],
)
def test_roundtrip(where, tmp_path, peer, kind, table):
    peer("qemu-img")
    image = make_image(tmp_path, kind, table)
    done = mounting.mount(image, where)
    assert done.partition == (None if table is None else 1)
    written = fill(where)
    assert mounting.unmount(where)
    assert len(written) == 9
    assert read_elsewhere(image, kind, table, tmp_path) == written
    before = digest(image)
    mounting.mount(image, where, read_only=True)
    assert read_tree(where) == written
    with pytest.raises(OSError, match="Read-only"):
        (where / "new").touch()
    assert mounting.unmount(where)
    assert digest(image) == before


@pytest.mark.parametrize("suffix", ["vhd", "raw"])
def test_other_formats(where, tmp_path, peer, suffix):
    peer("qemu-img")
    image = make_image(tmp_path, "ext4", "gpt", suffix)
    mounting.mount(image, where)
    written = fill(where)
    mounting.unmount(where)
    assert read_elsewhere(image, "ext4", "gpt", tmp_path) == written


def test_differencing(where, tmp_path):
    parent, child = make_image(tmp_path, "ext4"), tmp_path / "child.vhdx"
    vhdx.create(child, parent=parent)
    before = digest(parent)
    mounting.mount(child, where)
    written = fill(where)
    mounting.unmount(where)
    assert digest(parent) == before
    mounting.mount(child, where, read_only=True)
    assert read_tree(where) == written
    mounting.unmount(where)


def test_sectors_of_4096_bytes(where, tmp_path):
    """A partition table counts in logical sectors, so the devices must have the same sectors."""
    image = tmp_path / "disk.vhdx"
    vhdx.create(image, SIZE, logical_sector_size=4096)
    disk = mounting.attach(image).devices[0].device
    assert do("blockdev", "--getss", disk).strip() == "4096"
    do("sfdisk", "-q", "--no-reread", disk, input="label: gpt\nsize=200M\ntype=L\n")
    mounting.detach(image)
    devices = mounting.attach(image).devices
    assert [each.partition for each in devices] == [None, 1, 2]
    assert devices[1].length == 200 * MIB
    make_filesystem(devices[1].device, "ext4")
    make_filesystem(devices[2].device, "ext4")
    mounting.detach(devices[1].device)
    mounting.mount(image, where, partition=1)
    written = fill(where)
    mounting.unmount(where)
    second = where.with_name("mnt2")
    second.mkdir()
    mounting.mount(image, where, partition=1)
    mounting.mount(image, second, partition=2)
    assert read_tree(where) == written
    written = fill(second)
    assert mounting.unmount(image)
    mounting.mount(image, second, partition=2, read_only=True)
    assert read_tree(second) == written
    mounting.unmount(second)


def test_windows_image(where, sample, tmp_path, peer):
    """The files are those that the tools of ntfs-3g see, which do not mount."""
    peer("qemu-img", "ntfsls", "ntfscat")
    image = sample("dynamic.vhdx")
    before = digest(image)
    done = mounting.mount(image, where, read_only=True)
    assert done.partition == 1
    assert done.filesystem in {"ntfs-3g", "ntfs3"}
    seen = {str(p.relative_to(where)): p for p in where.rglob("*")}
    raw, part = tmp_path / "whole.raw", tmp_path / "part.raw"
    do("qemu-img", "convert", "-O", "raw", image, raw)
    table = json.loads(do("sfdisk", "--json", raw))["partitiontable"]["partitions"][0]
    data = raw.read_bytes()[table["start"] * 512 : (table["start"] + table["size"]) * 512]
    part.write_bytes(data)
    listed = {each.rstrip("/") for each in do("ntfsls", "-as", part).splitlines()}
    at_root = {name for name in seen if "/" not in name}
    assert at_root == {each for each in listed if not each.startswith((".", "$"))}
    for name, path in seen.items():
        if path.is_file():
            other = subprocess.run(["ntfscat", part, name], capture_output=True, check=True).stdout
            assert path.read_bytes() == other
    mounting.unmount(where)
    assert digest(image) == before


def test_writing_to_a_windows_image(where, sample, tmp_path, peer):
    peer("qemu-img")
    image = sample("dynamic.vhdx")
    mounting.mount(image, where)
    (where / "new.txt").write_text("from Linux")
    mounting.unmount(where)
    expected = hashlib.sha256(b"from Linux").hexdigest()
    assert read_elsewhere(image, "ntfs", "dos", tmp_path)["new.txt"] == expected
    assert vhdx.check(image).errors == 0


def test_lvm_inside(where, sample):
    """It is said how to reach the file system, and the devices are there."""
    image = sample("lvm2.vhdx")
    with pytest.raises(vhdx.UnsupportedError, match="vgchange"):
        mounting.mount(image, where, read_only=True)
    before = digest(image)
    devices = mounting.attach(image, read_only=True).devices
    assert [(each.partition, each.filesystem) for each in devices] == [
        (None, "gpt"),
        (1, "LVM2_member"),
    ]
    with open(devices[1].device, "rb") as file:
        assert file.read(1024)[512:520] == b"LABELONE"
    mounting.detach(image)
    assert digest(image) == before


def test_a_second_mount_changes_nothing(where, tmp_path):
    image = make_image(tmp_path, "ext4")
    other = tmp_path / "other.vhdx"
    os.link(image, other)
    first = mounting.mount(image, where)
    again = mounting.mount(other, where)
    assert again.device == first.device
    assert again.notes == ("it was mounted already",)
    found = mounting.mounts()
    assert [each.directory for each in found if each.image == str(image)] == [str(where)]
    assert mounting.unmount(other)
    assert not mounting.unmount(where)


def test_mounted(where, tmp_path):
    image = make_image(tmp_path, "ext4")
    with vhdx.mounted(image) as path:
        assert stat.S_ISDIR(path.stat().st_mode)
        (path / "file").write_text("content")
    assert not path.exists()
    with vhdx.mounted(image, where, read_only=True) as path:
        assert path == where
        assert (path / "file").read_text() == "content"
    with vhdx.mounted(image, snapshot=True) as path:
        (path / "file").unlink()
    with vhdx.mounted(image, where, read_only=True):
        assert (where / "file").read_text() == "content"


def test_programs_of_the_owner_do_not_rule_here(where, tmp_path):
    """A file that would make its caller root, and a device, are only files."""
    image = make_image(tmp_path, "ext4")
    with vhdx.mounted(image, where):
        options = do("findmnt", "-no", "OPTIONS", where)
        assert {"nosuid", "nodev", "rw"} <= set(options.strip().split(","))


def run_both(*arguments):
    """Both outputs of a command that succeeds."""
    command = [*VHDX, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout + done.stderr


def test_commands(where, tmp_path):
    image = make_image(tmp_path, "ext4", "gpt")
    said = run("mount", image, where)
    assert said.startswith("partition 1 (ext4, /dev/")
    (where / "file").write_text("content")
    (row,) = [each for each in json.loads(run("mounts", "--json")) if each["image"] == str(image)]
    assert (row["directory"], row["partition"], row["problem"]) == (str(where), 1, None)
    served = [each for each in json.loads(run("ps", "--json")) if each["pid"] == row["pid"]]
    assert served[0]["mounted"] == [str(where)]
    assert f"serves what is mounted or attached: {where}" in run("stop", image, code=4)
    assert run("umount", where) == ""
    assert "nothing is mounted there" in run_both("umount", where)
    attached = json.loads(run("attach", image, "--json"))
    assert [each["partition"] for each in attached["devices"]] == [None, 1]
    run("detach", attached["devices"][1]["device"])


def test_growth_is_seen_by_the_next_mount(where, tmp_path):
    image = make_image(tmp_path, "ext4")
    with vhdx.open(image, "r+") as disk:
        disk.resize(2 * SIZE)
    device = mounting.attach(image).devices[0].device
    do("resize2fs", device)
    mounting.detach(image)
    with vhdx.mounted(image, where):
        status = os.statvfs(where)
        assert status.f_blocks * status.f_frsize > 1.5 * SIZE


def test_trim_gives_space_back(where, tmp_path):
    """What was deleted in the file system becomes free space of the host, by fstrim."""
    image = make_image(tmp_path, "ext4")
    mounting.mount(image, where)
    (where / "big").write_bytes(os.urandom(200 * MIB))
    os.sync()
    used = image.stat().st_blocks * 512
    (where / "big").unlink()
    os.sync()
    do("fstrim", where)
    mounting.unmount(where)
    assert image.stat().st_blocks * 512 < used - 128 * MIB


def test_partition_of_its_own_place(where, tmp_path):
    """--partition 0 means the whole disk, also where there is a table."""
    raw = make_disk(tmp_path / "disk.raw", "ext4", "dos")
    with pytest.raises(vhdx.VhdxError, match="no file system was found"):
        mounting.mount(raw, where, partition=0)
    done = mounting.mount(raw, where, partition=1)
    offset = do("losetup", "-nO", "OFFSET", done.device)
    assert int(offset) == START
    mounting.unmount(where)


def test_the_readme(where, tmp_path):
    """Its commands, with a directory of the test in place of /mnt."""
    text = (Path(__file__).parents[2] / "README.md").read_text().split("Mounted, as root.")[1]
    image = make_image(tmp_path, "ext4")
    image.rename(tmp_path / "disk.vhdx")
    lines = next(commands(text))
    assert len(lines) == 8
    type_all([line.replace("/mnt", str(where)) for line in lines], tmp_path)
    with vhdx.mounted(tmp_path / "disk.vhdx", where, read_only=True):
        assert (where / "hostname").read_bytes() == Path("/etc/hostname").read_bytes()
