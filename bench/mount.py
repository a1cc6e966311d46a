# SPDX-License-Identifier: MIT
"""Copies into a mounted ext4 image and back: ours, qemu-nbd behind the same nbdfuse and loop device.

The loop devices of both do direct I/O. A raw file that is mounted through a loop device alone is
the reference. A round copies a file into a
new image and syncs it, drops all caches, and reads the file back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import vhdx
from bench.conditions import (
    Places,
    back_free_memory,
    fill_with_random_data,
    median_ratio,
    require,
    start_qemu,
    work_directory,
)
from vhdx.units import GIB, MIB

_MAKE = ("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0")  # no work afterwards


def _do(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def _loop(file: Path, where: Path, *options: str) -> Iterator[None]:
    device = _do("losetup", "--find", "--show", *options, file)
    try:
        _do("mount", device, where)
        try:
            yield
        finally:
            _do("umount", where)
    finally:
        _do("losetup", "-d", device)


@contextlib.contextmanager
def _ours(image: Path, where: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "vhdx.cli"]
    _do(*command, "mount", image, where, "--via", "fuse")
    try:
        yield
    finally:
        _do(*command, "umount", where)


@contextlib.contextmanager
def _qemu(image: Path, where: Path) -> Iterator[None]:
    work = image.parent
    fuse, socket = work / "fuse", work / "qemu-vhdx.sock"
    fuse.mkdir(exist_ok=True)
    server = start_qemu(image, "vhdx", work, None)
    client = subprocess.Popen(["nbdfuse", "--connections=4", f"{fuse}/disk", "--unix", str(socket)])
    try:
        for _ in range(500):
            if (fuse / "disk").exists():
                break
            time.sleep(0.02)
        with _loop(fuse / "disk", where, "--direct-io=on"):  # as ours
            yield
    finally:
        _do("fusermount3", "-u", fuse)
        client.wait()
        server.stop()


_WAYS: dict[str, Callable[[Path, Path], contextlib.AbstractContextManager[None]]] = {
    "vhdx": _ours,
    "qemu-nbd": _qemu,
    "raw and loop": _loop,
}


def _drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _round(name: str, template: Path, source: Path, where: Path) -> tuple[float, float]:
    """Seconds to copy the file in and sync it, and to read it back."""
    image = template.with_name(f"used{template.suffix}")
    shutil.copyfile(template, image)
    size = source.stat().st_size
    with _WAYS[name](image, where):
        _drop_caches()
        source.read_bytes()
        back_free_memory(2 * size)
        began = time.monotonic()
        _do("cp", source, where / "file")
        _do("sync", "-f", where)
        written = time.monotonic() - began
        _drop_caches()
        back_free_memory(2 * size)
        began = time.monotonic()
        _do("dd", f"if={where / 'file'}", "of=/dev/null", "bs=1M")
        read = time.monotonic() - began
        _do("cmp", source, where / "file")
    image.unlink()
    return written, read


def _templates(work: Path, size: int) -> dict[str, Path]:
    raw, image = work / "disk.raw", work / "disk.vhdx"
    with raw.open("wb") as file:
        file.truncate(4 * size)
    _do(*_MAKE, raw)
    vhdx.convert(raw, image)
    return {"vhdx": image, "qemu-nbd": image, "raw and loop": raw}


def run(places: Places, *, quick: bool) -> dict[str, Any]:
    """Times per way, and ratios to the peers."""
    require("qemu-nbd", "nbdfuse", "fusermount3", "losetup", "mkfs.ext4")
    if os.geteuid() != 0:
        raise SystemExit("only root can mount")
    size = 128 * MIB if quick else GIB
    rounds = 3 if quick else 5
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in _WAYS}
    with work_directory(places.fast) as fast, work_directory(places.disk) as work:
        source, where = fast / "source", work / "mnt"
        where.mkdir()
        fill_with_random_data(source, size)
        templates = _templates(work, size)
        for number in range(rounds):
            names = list(_WAYS)
            for name in names[number % 3 :] + names[: number % 3]:
                seconds[name].append(_round(name, templates[name], source, where))
    return {
        title: _rows([[each[which] for each in seconds[name]] for name in _WAYS], size)
        for which, title in ((0, "copied in and synced"), (1, "read back, nothing cached"))
    }


def _rows(seconds: list[list[float]], size: int) -> list[dict[str, Any]]:
    rows = []
    for name, found in zip(_WAYS, seconds, strict=True):
        ratio, low, high = median_ratio(found, seconds[0])
        rows.append(
            {
                "way": name,
                "MB_per_s": size / 1e6 / statistics.median(found),
                "vhdx_is_times_as_fast": ratio,
                "least": low,
                "greatest": high,
            }
        )
    return rows
