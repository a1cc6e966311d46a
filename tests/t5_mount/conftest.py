# SPDX-License-Identifier: MIT
"""What tests of mounting share. They need root, FUSE and loop devices."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import absent
from vhdx import mounting
from vhdx.mounting import records

_PROGRAMS = "nbdfuse fusermount3 losetup partx blkid mkfs.ext4 mkfs.xfs mkfs.btrfs mkfs.ntfs"


@pytest.fixture
def where(tmp_path):
    """An empty directory to mount on. Afterwards nothing of the test may be mounted or attached."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not os.access(device, os.R_OK | os.W_OK):
            absent(device)
    for program in _PROGRAMS.split():
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            absent(program)
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    try:
        assert remains(tmp_path) == []
    finally:
        for found in records.load_all():
            if Path(found.image).is_relative_to(tmp_path):
                mounting.unmount(found.image, discard=found.overlay is not None)


def remains(directory):
    """What the images in a directory left on this machine."""
    files = [path.lstat() for path in directory.iterdir()]
    keys = [f"{each.st_dev:x}-{each.st_ino:x}" for each in files]
    found = [str(p) for p in records.DIRECTORY.glob("*") if p.name.removesuffix(".lock") in keys]
    texts = Path("/proc/self/mounts").read_text().splitlines()
    loops = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout
    texts += loops.splitlines()
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            texts.append(process.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it has ended
    keys_there = re.compile(rf"/({'|'.join(keys)})(?![0-9a-f])")  # views have names of their own
    there = f" {directory}/mnt"
    return found + [each for each in texts if keys_there.search(each) or there in each]
