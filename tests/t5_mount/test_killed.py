# SPDX-License-Identifier: MIT
"""Processes are killed and hosts are full: no hang, no false success, what was synced is there."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

import vhdx
from tests.t4_cli.command import VHDX, run
from tests.t5_mount.conftest import remains
from tests.t5_mount.disks import do, fill, make_image, read_tree
from vhdx import mounting
from vhdx.mounting import records
from vhdx.mounting.attaching import key_of
from vhdx.units import MIB

_PATIENCE = 30


def kill(process):
    """Kills a process of a record; returns when it is dead."""
    process.signal(signal.SIGKILL)
    while process.alive:
        time.sleep(0.01)


def problem_of(image):
    """What vhdx mounts says about an image."""
    return next(each.problem for each in mounting.mounts() if each.image == str(image))


@pytest.fixture
def image(where, tmp_path):
    return make_image(tmp_path, "ext4")


@pytest.mark.parametrize("part", ["server", "fuse"])
def test_killed_under_a_mount(image, where, part):
    mounting.mount(image, where, via="fuse")
    written = fill(where)
    os.sync()
    kill(getattr(records.load(key_of(image)), part))
    (where / "lost").write_bytes(bytes(MIB))
    assert "every access fails: vhdx umount" in problem_of(image)
    assert f"vhdx umount {where}" in run("mounts")
    begun = time.monotonic()
    with pytest.raises(vhdx.HostIOError, match="not everything may be in the image"):
        mounting.unmount(where)
    assert time.monotonic() - begun < _PATIENCE
    assert not os.path.ismount(where)
    assert not mounting.unmount(where)
    mounting.mount(image, where, yes=True)  # the journal says that it was not unmounted
    found = read_tree(where)
    found.pop("lost", None)
    assert found == written
    mounting.unmount(where)


def test_server_is_told_to_stop(image, where):
    """Somebody sends SIGTERM to the server of a mount, which writes and closes, then goes."""
    mounting.mount(image, where)
    written = fill(where)
    os.sync()
    server = records.load(key_of(image)).server
    os.kill(server.pid, signal.SIGTERM)
    while server.alive:
        time.sleep(0.05)
    with pytest.raises(vhdx.HostIOError, match="not everything may be in the image"):
        mounting.unmount(where)
    with vhdx.mounted(image, where, yes=True):
        assert read_tree(where) == written


def test_reading_mount_whose_server_died(image, where):
    """Nothing can be lost, so ending it is a success."""
    mounting.mount(image, where, read_only=True)
    kill(records.load(key_of(image)).server)
    assert problem_of(image)
    with pytest.raises(vhdx.InUseError, match="has died"):
        mounting.mount(image, where, read_only=True)
    assert mounting.unmount(where)


def _run_and_kill(*arguments, after):
    """Runs a command for some time; returns its exit code, or None if it was killed."""
    with subprocess.Popen(
        [*VHDX, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            return process.wait(after)
        except subprocess.TimeoutExpired:
            process.kill()
    return None


@pytest.mark.parametrize("after", [0.3, 0.5, 0.7, 0.9])
def test_mount_is_killed(image, where, after):
    _run_and_kill("mount", image, where, after=after)
    mounting.mounts()
    assert mounting.mount(image, where).directory == str(where)
    (where / "file").write_text("content")
    mounting.unmount(where)
    _run_and_kill("mount", image, where, after=after)
    mounting.unmount(image)
    assert remains(image.parent) == []


@pytest.mark.parametrize("after", [0.3, 0.4, 0.5, 0.6])
def test_umount_is_killed(image, where, after):
    mounting.mount(image, where)
    written = fill(where)
    os.sync()
    _run_and_kill("umount", where, after=after)
    with contextlib.suppress(vhdx.HostIOError):
        mounting.unmount(image)
    assert not os.path.ismount(where)
    mounting.mount(image, where, yes=True)
    assert read_tree(where) == written
    mounting.unmount(where)


@pytest.fixture
def small(where, tmp_path):
    """A host file system that is soon full."""
    path = tmp_path / "small"
    path.mkdir()
    do("mount", "-t", "tmpfs", "-o", "size=96M", "tmpfs", path)
    yield path
    if where.exists() and os.path.ismount(where):
        with contextlib.suppress(vhdx.VhdxError):
            mounting.unmount(where)
    do("umount", path)


def write_much(path):
    with path.open("wb") as file:
        for _ in range(280):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def test_host_is_full(where, tmp_path, small):
    """The writer gets an error, umount reports it, and the image is whole."""
    image = make_image(small, "ext4")
    mounting.mount(image, where)
    written = fill(where)
    os.sync()
    with pytest.raises(OSError, match=r"Input/output|No space|Read-only"):
        write_much(where / "big")
    with pytest.raises(vhdx.HostIOError, match="writes of the kernel failed"):
        mounting.unmount(where)
    assert vhdx.check(image).errors == 0
    do("mount", "-o", "remount,size=400M", small)
    mounting.mount(image, where, yes=True)
    found = read_tree(where)
    assert {name: found[name] for name in written} == written
    mounting.unmount(where)
    raw = tmp_path / "after.raw"
    vhdx.convert(image, raw)
    do("e2fsck", "-fn", raw)


def test_killed_between_a_device_and_its_record(where, tmp_path):
    """A loop device that nobody recorded is found by what it shows."""
    for kind in ("ext4", "xfs"):
        image = make_image(tmp_path, kind)
        wrapper = tmp_path / kind / "losetup"
        wrapper.parent.mkdir()
        wrapper.write_text(
            '#!/bin/sh\n/sbin/losetup "$@"; case "$*" in *--find*) kill -9 $PPID;; esac\n'
        )
        wrapper.chmod(0o755)
        path = f"{wrapper.parent}:{os.environ['PATH']}"
        done = subprocess.run(
            [*VHDX, "mount", image, where], env=os.environ | {"PATH": path}, check=False
        )
        assert done.returncode == -signal.SIGKILL
        begun = time.monotonic()
        with contextlib.suppress(vhdx.HostIOError):
            mounting.unmount(image)
        assert time.monotonic() - begun < _PATIENCE
        assert remains(tmp_path) == []


def test_descriptors_of_the_caller_are_not_kept(image, where, tmp_path):
    """A lock that a script holds is free when the script has ended."""
    lock = tmp_path / "lock"
    script = f"exec 9>{lock}; flock 9; {' '.join(VHDX)} mount {image} {where}"
    subprocess.run(["bash", "-c", script], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["flock", "--nonblock", lock, "true"], check=True)
    mounting.unmount(where)


def test_two_at_once(image, where, tmp_path):
    """Commands for one image wait for each other; one of two mounts wins."""
    other = tmp_path / "mnt2"
    other.mkdir()
    said = []

    def mount(path):
        try:
            said.append(mounting.mount(image, path).directory)
        except vhdx.InUseError as error:
            said.append(error.message)

    threads = [threading.Thread(target=mount, args=(path,)) for path in (where, other, where)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "the disk is mounted already" in said
    assert sum(os.path.ismount(path) for path in (where, other)) == 1
    assert mounting.unmount(image)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(50))
def test_killed_at_random(image, where, seed):
    """kill -9 of the server, or of a command, while files are written and synced."""
    chance = random.Random(seed)
    synced = {}
    for _ in range(3):
        begun = time.monotonic()
        code = _run_and_kill("mount", image, where, "--yes", after=chance.uniform(0.2, 2))
        mounting.mount(image, where, yes=True)
        assert time.monotonic() - begun < _PATIENCE
        if code == 0:
            assert {name: read_tree(where).get(name) for name in synced} == synced
        victim = chance.choice(["server", "fuse", "command", None])
        unsynced = {}
        if victim in {"server", "fuse"}:
            process = getattr(records.load(key_of(image)), victim)
            threading.Timer(chance.uniform(0, 0.5), kill, [process]).start()
        with contextlib.suppress(OSError):
            for number in range(20):
                path = where / f"{seed}-{number}-{len(synced)}"
                with path.open("wb") as file:
                    file.write(os.urandom(chance.randrange(300_000)))
                    file.flush()
                    os.fsync(file.fileno())
                synced[path.name] = read_tree(where)[path.name]
            path = where / f"{seed}-unsynced-{len(synced)}"
            path.write_bytes(os.urandom(100_000))
            unsynced = {path.name: read_tree(where)[path.name]}
        begun = time.monotonic()
        after = chance.uniform(0.2, 0.8) if victim == "command" else _PATIENCE
        code = _run_and_kill("umount", where, after=after)
        try:
            mounting.unmount(image)
        except vhdx.HostIOError:
            code = 1
        if code in {0, None}:  # or it was killed, and the next one succeeded
            synced |= unsynced
        assert time.monotonic() - begun < _PATIENCE
        assert remains(image.parent) == []
        with vhdx.mounted(image, where, yes=True, read_only=False):
            found = read_tree(where)
            assert {name: found.get(name) for name in synced} == synced


@pytest.mark.soak
def test_a_hundred_cycles(image, where):
    """Nothing stays behind: no process, device, socket, mount or file."""
    before = set(Path("/tmp").glob("vhdx*"))
    for number in range(100):
        run("mount", image, where)
        (where / "counter").write_text(str(number))
        run("umount", where)
        assert remains(image.parent) == []
    assert set(Path("/tmp").glob("vhdx*")) - before == set()
    with vhdx.mounted(image, where, read_only=True):
        assert (where / "counter").read_text() == "99"


@pytest.mark.soak
def test_forty_images_at_once(image, where, tmp_path):
    """Commands for different images do not wait for each other."""
    names = [f"disk{number}" for number in range(40)]
    for name in names:
        shutil.copyfile(image, tmp_path / f"{name}.vhdx")
        (where / name).mkdir()
    children = [
        subprocess.Popen([*VHDX, "mount", tmp_path / f"{name}.vhdx", where / name]) for name in names
    ]
    assert [child.wait(300) for child in children] == [0] * len(names)
    for name in names:
        (where / name / "who").write_text(name)
    assert len([each for each in mounting.mounts() if Path(each.image).parent == tmp_path]) == 40
    children = [subprocess.Popen([*VHDX, "umount", where / name]) for name in names]
    assert [child.wait(300) for child in children] == [0] * len(names)
    for name in names:
        with vhdx.mounted(tmp_path / f"{name}.vhdx", where / name, read_only=True):
            assert (where / name / "who").read_text() == name
