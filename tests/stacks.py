# SPDX-License-Identifier: MIT
"""Stacks for tests: maps over maps over several files, and VHDX images on top of them."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import vhdx
from vhdx import plane
from vhdx.image.host import HostFile
from vhdx.image.vhdx.image import open_vhdx
from vhdx.plane._native import lib
from vhdx.units import MIB

RECORDS = MIB  # before the first page on lower 0, where a lazy store writes its commits


class Store:
    """A map whose pages lie in turn on its lower devices.

    Args:
        lowers: where the pages lie, from ``base`` on.
        size: bytes.
        level: of its pool.
        base: bytes, at least ``RECORDS``.
        page: bytes of a page.
        ahead: every page has its place from the start, so the store never commits. Else a page gets
            one at its first write, and a commit writes a record and makes a barrier.
    """

    def __init__(
        self,
        lowers: Sequence[plane.Device],
        size: int,
        level: plane.Level,
        *,
        base: int = RECORDS,
        page: int = MIB,
        ahead: bool = True,
    ) -> None:
        self.lowers, self.base, self.page, self.ahead = list(lowers), base, page, ahead
        self._next, self._lock = 0, threading.Lock()
        self.commits = 0
        self.device = plane.Map(
            self,
            size,
            size,
            page,
            lowers,
            pool=plane.shared_pool(level),
            path=f"a {level.name} store",
        )

    def _places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        index = np.arange(first, first + count, dtype=np.uint64)
        lower = index % np.uint64(len(self.lowers))
        row = index // np.uint64(len(self.lowers))
        return lower, row * np.uint64(self.page) + np.uint64(self.base)

    def load(self, first: int, count: int) -> None:
        lower, offset = self._places(first, count)
        if self.ahead:
            entries = plane.entries(plane.Kind.DATA, lower, offset, 0)
        else:
            entries = np.full(count, plane.entries(plane.Kind.HOLE, 0, 0, 0), np.uint64)
        self.device.install(first, entries)

    def grant(self, wanted: int) -> None:
        with self._lock:
            first, self._next = self._next, self._next + max(1, wanted)
        for lower, offset in zip(*self._places(first, max(1, wanted)), strict=True):
            self.device.grant(int(lower), np.array([offset], np.uint64), 0)

    def open_gate(self) -> None:
        self.device.set_gate(is_open=True)

    def change_range(self, operation: plane.Operation, first: int, count: int, size: int) -> None:
        pages = np.arange(first, first + count, dtype=np.uint64)
        for page in pages.tolist():
            self.device.write(bytes(min(self.page, size - page * self.page)), page * self.page)

    def commit(self, changes: plane.Changes) -> None:
        self.commits += 1
        record = changes.pages[:64].tobytes().ljust(512, b"\0")
        self.lowers[0].batch(
            [
                plane.Step(
                    plane.Operation.WRITE,
                    self.base - RECORDS + self.commits % 64 * 512,
                    buffer=record,
                ),
                plane.Step(plane.Operation.FLUSH),
            ]
        )


def files(directory: Path, count: int, size: int) -> list[plane.File]:
    """Sparse files as leaves."""
    leaves = []
    for i in range(count):
        fd = os.open(directory / f"leaf{i}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(fd, size)
        leaves.append(plane.File(fd, size, read_only=False))
    return leaves


def image_on(
    device: plane.Device,
    size: int,
    block_size: int = MIB,
    *,
    set_aside: Callable[[int, int], None] | None = None,
) -> vhdx.Disk:
    """A new VHDX image whose file is ``device``; ``set_aside`` takes the place of the file's."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "new.vhdx"
        vhdx.create(path, size, block_size=block_size)
        content = path.read_bytes()
    for at in range(0, len(content), MIB):
        if any(content[at : at + MIB]):
            device.write(content[at : at + MIB], at)
    device.flush()
    leaf = Front(device, len(content))
    host = HostFile("stacked.vhdx", leaf, read_only=False, sparse=True, key=(0, id(leaf)), keep=True)
    if set_aside is not None:
        host.set_aside = set_aside  # type: ignore[assignment, method-assign]
    pool = plane.shared_pool(plane.Level.IMAGE)
    return vhdx.Disk(open_vhdx(host, write=True, chain=True, parent_search=(), pool=pool, force=True))


class Front(plane.Device):
    """The first bytes of a device, as a file that grows; every page below has its place."""

    def __init__(self, device: plane.Device, size: int) -> None:
        super().__init__(lib.vx_device_reference(device.handle), "stacked.vhdx")
        self._size, self._below = size, device

    @property
    def size(self) -> int:
        return self._size

    def resize(self, size: int) -> None:
        self._size = size
