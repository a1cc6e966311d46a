# SPDX-License-Identifier: MIT
"""Disks with file systems, made and read by other programs than ours."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from pathlib import Path

import vhdx
from vhdx.units import MIB

SIZE = 320 * MIB
START = MIB
_MAKERS = {
    "ext4": ("mkfs.ext4", "-q"),
    "xfs": ("mkfs.xfs", "-q"),
    "btrfs": ("mkfs.btrfs", "-q"),
    "ntfs": ("mkfs.ntfs", "-FqQ", "-p", "2048", "-H", "1", "-S", "1"),
}
_READERS = {"ntfs": ("-t", "ntfs-3g", "-o", "ro,norecover")}
_TYPES = {"gpt": "0FC63DAF-8483-4772-8E79-3D69D8477DE4", "dos": "83"}


def do(*arguments, **settings):
    """Runs a program that must succeed; returns what it prints."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run(
        [str(each) for each in arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
        check=False,
        **settings,
    )
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def loop(path, *options):
    """A loop device for a file, or for a part of it."""
    device = do("losetup", "--find", "--show", *options, path).strip()
    try:
        yield device
    finally:
        do("losetup", "-d", device)


def make_filesystem(device, kind):
    """Makes a file system on a block device or in a file."""
    do(*_MAKERS[kind], device)


def make_disk(path, kind, table=None, size=SIZE, make=make_filesystem):
    """A raw disk with a file system, in partition 1 if there is a partition table."""
    with path.open("wb") as file:
        file.truncate(size)
    start = 0
    if table is not None:
        start = START
        sectors = (size - 2 * MIB) // 512
        script = f"label: {table}\nstart={START // 512}, size={sectors}, type={_TYPES[table]}\n"
        do("sfdisk", "-q", path, input=script)
    length = size - 2 * MIB if table else size
    with loop(path, f"--offset={start}", f"--sizelimit={length}") as device:
        make(device, kind)
    return path


def make_image(directory, kind, table=None, suffix="vhdx", make=make_filesystem):
    """The same as an image of ours."""
    raw = make_disk(directory / f"{kind}.raw", kind, table, make=make)
    if suffix == "raw":
        return raw
    path = directory / f"{kind}.{suffix}"
    vhdx.convert(raw, path)
    raw.unlink()
    return path


def fill(directory):
    """Writes files of many sizes, and names in many scripts; returns what :func:`read_tree` finds."""
    for number, size in enumerate((0, 1, 511, 4096, 100_000, 3_000_001)):
        (directory / f"file{number}").write_bytes(hashlib.shake_128(b"%d" % number).digest(size))
    for name in ("a name with spaces", "ünïcödé", "日本語"):
        (directory / name).mkdir()
        (directory / name / "inside").write_text(name)
    return read_tree(directory)


def read_tree(directory):
    """The content of each file, hashed, by its path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(directory).rglob("*")
        if path.is_file() and "lost+found" not in path.parts
    }


def read_elsewhere(image, kind, table, directory):
    """What an image holds: converted by QEMU, mounted by the kernel; without any part of ours."""
    raw, where = directory / "elsewhere.raw", directory / "elsewhere"
    do("qemu-img", "convert", "-O", "raw", image, raw)
    where.mkdir(exist_ok=True)
    start = 0 if table is None else _start(raw)
    try:
        with loop(raw, "--read-only", f"--offset={start}") as device:
            do("mount", *_READERS.get(kind, ("-o", "ro")), device, where)
            try:
                return read_tree(where)
            finally:
                do("umount", where)
    finally:
        raw.unlink()


def _start(raw):
    return json.loads(do("sfdisk", "--json", raw))["partitiontable"]["partitions"][0]["start"] * 512


def digest(path):
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
