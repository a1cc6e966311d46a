# SPDX-License-Identifier: MIT
"""Real clients: libnbd, qemu-img, fio with verification, ext4 over nbdfuse and a loop device."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path

import google_crc32c
import pytest

import vhdx
from tests.conftest import absent
from vhdx import plane
from vhdx.image.vhdx import snapshots
from vhdx.units import MIB


@pytest.fixture
def image(fast_path):
    path = fast_path / "disk.vhdx"
    vhdx.create(path, 512 * MIB, block_size=MIB)
    return path


def run(*command, timeout=300, cwd=None):
    result = subprocess.run(
        [str(each) for each in command], capture_output=True, timeout=timeout, cwd=cwd
    )
    text = (result.stdout + result.stderr).decode(errors="replace")
    assert result.returncode == 0, text
    return text


def test_nbdinfo_shows_what_is_offered(image, peer):
    peer("nbdinfo")
    with vhdx.serve({"disk": image}) as server:
        text = run("nbdinfo", server.uri)
        listed = run("nbdinfo", "--list", server.uri)
    for what in ("flush", "fua", "trim", "zero", "fast_zero", "cache", "df", "multi_conn"):
        assert f"can_{what}: true" in text
    assert "base:allocation" in text
    assert "is_read_only: false" in text
    assert "block_size_minimum: 1" in text
    assert "block_size_preferred: 4096" in text
    assert "block_size_maximum: 33554432" in text
    assert "structured" in text
    assert 'export="disk"' in listed


def random_raw(path, size):
    """Random data with holes in between."""
    with path.open("wb") as file:
        for offset in range(0, size, 3 * MIB):
            file.seek(offset)
            file.write(os.urandom(MIB + 512))
        file.truncate(size)
    return path


@pytest.mark.parametrize("tool", ["nbdcopy", "qemu-img"])
def test_copies_in_both_directions_are_identical(image, fast_path, tool, peer):
    peer(tool, "cmp")
    raw = random_raw(fast_path / "in.raw", 512 * MIB)
    back = fast_path / "out.raw"
    with vhdx.serve({"disk": image}) as server:
        if tool == "nbdcopy":
            run("nbdcopy", "--flush", raw, server.uri)
            run("nbdcopy", server.uri, back)
        else:
            raws = ["-f", "raw", "-O", "raw"]
            run("qemu-img", "convert", "-n", "-W", "-m", "8", *raws, raw, server.uri)
            run("qemu-img", "convert", *raws, server.uri, back)
    run("cmp", raw, back)
    run("qemu-img", "compare", "-f", "vhdx", "-F", "raw", image, raw)
    with vhdx.open(image) as disk:
        assert disk.describe()["blocks"]["fully_present"] < 400  # holes stayed holes


def fio_verify(uri, seconds, cwd):
    options = "--ioengine=nbd --rw=randrw --bs=4k --iodepth=16 --numjobs=4 --size=128m "
    options += "--offset_increment=128m --verify=crc32c --verify_fatal=1 --time_based"
    text = run(
        "fio", "--name=v", *options.split(), f"--uri={uri}", f"--runtime={seconds}",
        timeout=seconds + 120, cwd=cwd,
    )  # fmt: skip
    assert "err= 0" in text


def test_fio_verifies_what_it_wrote(image, peer, tmp_path):
    peer("fio")
    with vhdx.serve({"disk": image}) as server:
        fio_verify(server.uri, 8, tmp_path)


@pytest.mark.soak
def test_fio_verifies_for_a_minute(image, peer, tmp_path):
    peer("fio")
    with vhdx.serve({"disk": image}) as server:
        fio_verify(server.uri, 60, tmp_path)


def change_while_used(disk, directory, stop, done, *, grows, compacts, snapshots):
    """Grows, compacts and snapshots of a disk that is served, one after the other."""
    steps = ["grow"] * grows + ["compact"] * compacts + ["snapshot"] * snapshots
    random.Random(1).shuffle(steps)
    for number, step in enumerate(steps):
        if step == "grow":
            disk.resize(disk.size + 64 * MIB)
        elif step == "compact":
            at = disk.size - 32 * MIB  # behind what the client uses
            disk.pwrite(os.urandom(8 * MIB) + bytes(8 * MIB), at)
            disk.flush()
            disk.trim(at, 8 * MIB)
            done["reclaimed"] = done.get("reclaimed", 0) + disk.compact().reclaimed
        else:
            disk.snapshot(directory / f"s{number}.vhdx")
        done[step] = done.get(step, 0) + 1
        stop.wait(done["pause"])  # on a busy machine the last ones come without the client


def fingerprint(device):
    """What a device holds: a checksum of each MiB that is stored, but for those of zeros."""
    found = {}
    for extent in device.extents(0, device.size):
        for at in range(extent.offset // MIB * MIB, extent.offset + extent.length, MIB):
            if extent.state == plane.DATA and at not in found:
                data = device.read(min(MIB, device.size - at), at)
                found[at] = google_crc32c.value(data) if data.count(0) < len(data) else None
    return {at: value for at, value in found.items() if value is not None}


@pytest.fixture
def copies(monkeypatch):
    """By checkpoint, what the disk held at its instant, read while no request was on its way."""
    taken = {}
    settle = snapshots.FreshChild.settle

    def copied(child, switch, base, checkpoint):
        taken[Path(checkpoint)] = fingerprint(base.map)
        return settle(child, switch, base, checkpoint)

    monkeypatch.setattr(snapshots.FreshChild, "settle", copied)
    return taken


def verified_while_changed(image, directory, seconds, copies, **steps):
    stop, done = threading.Event(), {"pause": seconds * 0.8 / sum(steps.values())}
    with vhdx.open(image, "r+") as disk:
        disk.resize(disk.size + 64 * MIB)
        with vhdx.serve({"disk": disk}) as server:
            changer = threading.Thread(
                target=change_while_used, args=(disk, directory, stop, done), kwargs=steps
            )
            changer.start()
            try:
                fio_verify(server.uri, seconds, directory)
            finally:
                stop.set()
                changer.join()
            found = run("nbdinfo", "--size", server.uri).strip()
            assert int(found) == disk.size  # a new connection sees the new size
    assert {step: done.get(step, 0) for step in ("grow", "compact", "snapshot")} == {
        "grow": steps["grows"],
        "compact": steps["compacts"],
        "snapshot": steps["snapshots"],
    }
    assert done["reclaimed"] > 0
    for path in directory.glob("*.vhdx"):
        assert vhdx.check(path).errors == 0
    assert len(copies) == steps["snapshots"]
    assert any(copies.values())
    for path, copy in copies.items():
        with vhdx.open(path) as disk:
            assert fingerprint(disk._image.device) == copy


def test_fio_verifies_while_the_disk_is_changed(image, peer, fast_path, copies):
    peer("fio", "nbdinfo")
    verified_while_changed(image, fast_path, 10, copies, grows=5, compacts=2, snapshots=3)


@pytest.mark.soak
def test_fio_verifies_for_two_minutes_while_the_disk_is_changed(image, peer, fast_path, copies):
    peer("fio", "nbdinfo")
    verified_while_changed(image, fast_path, 120, copies, grows=20, compacts=5, snapshots=10)


@contextlib.contextmanager
def loop_device(uri, work):
    """The export as a block device: nbdfuse and a loop device."""
    mount = work / "fuse"
    mount.mkdir()
    fuse = subprocess.Popen(["nbdfuse", "-C", "4", str(mount / "nbd"), uri])
    device = None
    try:
        for _ in range(200):
            if (mount / "nbd").exists():
                break
            time.sleep(0.05)
        found = subprocess.run(
            ["losetup", "-f", "--show", str(mount / "nbd")], capture_output=True, text=True
        )
        if found.returncode != 0:
            absent("a loop device")
        device = found.stdout.strip()
        yield device
    finally:
        if device is not None:
            subprocess.run(["losetup", "-d", device], check=True)
        subprocess.run(["fusermount3", "-u", mount], check=False)
        fuse.wait(timeout=60)


def test_ext4_through_nbdfuse_and_a_loop_device(image, fast_path, peer):
    peer("nbdfuse", "losetup", "mkfs.ext4", "e2fsck", "fusermount3")
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        absent("root or /dev/fuse")
    tree = Path("/usr/share/doc")
    mount = fast_path / "mnt"
    mount.mkdir()
    with vhdx.serve({"disk": image}) as server, loop_device(server.uri, fast_path) as device:
        run("mkfs.ext4", "-q", device)
        run("mount", device, mount)
        try:
            shutil.copytree(tree, mount / "doc", symlinks=True)
        finally:
            run("umount", mount)
        run("e2fsck", "-fn", device)
        run("mount", "-o", "ro", device, mount)
        try:
            run("diff", "-r", "--no-dereference", tree, mount / "doc")
        finally:
            run("umount", mount)
    with vhdx.open(image) as disk, (fast_path / "out.raw").open("wb") as out:
        for offset in range(0, disk.size, MIB):
            out.write(disk.pread(MIB, offset))
    run("e2fsck", "-fn", fast_path / "out.raw")
