# SPDX-License-Identifier: MIT
"""Physical disks: files and block devices that are opened, labelled, found and recognised."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from vhdx import place, plane
from vhdx.errors import (
    DamagedError,
    ExistsError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    VhdxError,
)
from vhdx.ledger import Member
from vhdx.spaces.label import LABEL, LARGEST_NAME, Label, new_label, newest_label, place_parts
from vhdx.spaces.state import DiskState
from vhdx.spaces.states import MediaType, Usage
from vhdx.units import MIB, format_size

if TYPE_CHECKING:
    from vhdx.place import ImageFile

__all__ = ["DiskSpec", "PhysicalDisk", "absolute", "check_name", "open_all", "read_label"]

_MODELS = {
    "hdd": plane.ModelKind.HDD,
    "ssd": plane.ModelKind.SSD,
    "nvme": plane.ModelKind.NVME,
}
LEAST_SLABS = 2
"""A disk with fewer slabs is refused."""


def absolute(path: str | os.PathLike[str]) -> str:
    """The path from anywhere."""
    return os.path.abspath(path) if place.is_host(path) else place.spelled(path)


def check_name(name: str, what: str) -> str:
    """The name, if a pool, disk or space may have it.

    Raises:
        InvalidArgumentError: it may not.
    """
    if not name or len(name.encode(errors="surrogatepass")) > LARGEST_NAME:
        raise InvalidArgumentError(f"the name of {what} has 1 to {LARGEST_NAME} bytes")
    if any(c in "/=:,\0" or not c.isprintable() for c in name) or name in {".", ".."}:
        raise InvalidArgumentError(
            f"{what} cannot be named {name!r}", hint="use printable characters without / = : ,"
        )
    return name


@dataclass(frozen=True)
class DiskSpec:
    """A disk that a pool gets.

    Attributes:
        name: how people call it; unique in the pool.
        path: a file, which is made if it is not there, or a block device.
        size: bytes, for a file that is made; None: it is there already.
        media, usage: as in :mod:`vhdx.spaces.states`.
        latency: "hdd", "ssd" or "nvme": requests take as long as on such a disk. None: they do not.
    """

    name: str
    path: str | os.PathLike[str]
    size: int | None = None
    media: MediaType = MediaType.UNSPECIFIED
    usage: Usage = Usage.AUTO_SELECT
    latency: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "a disk")
        if self.latency is not None and self.latency not in _MODELS:
            raise InvalidArgumentError(
                f"there is no latency model {self.latency!r}", hint=f"use {', '.join(_MODELS)}"
            )


class PhysicalDisk:
    """An open disk of a pool.

    Attributes:
        file: the open, locked file.
        device: what spaces read and write: the file, behind its latency model if it has one.
        label: as it is on the disk.
        found_modified: when its file was last changed before this open, nanoseconds, or None.
    """

    def __init__(self, file: ImageFile, label: Label, latency: str | None) -> None:
        self.file, self.label = file, label
        self.found_modified = self.modified()
        self.device: plane.Device = file.leaf
        self.set_latency(latency)

    def set_latency(self, latency: str | None) -> None:
        """Makes it as slow as such a disk; before it is used."""
        if latency is not None:
            write_cache = latency != "hdd"
            model = plane.Model(_MODELS[latency], self.label.size, write_cache=write_cache)
            pool = plane.shared_pool(plane.Level.SPACE)
            self.device = plane.Delay(self.file.leaf, model, pool)

    @property
    def id(self) -> UUID:
        return self.label.disk

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def member(self) -> Member:
        """Its part of the pool's ledger. Metadata is not slowed down by latency models."""
        return Member(
            self.file.leaf, self.label.region_offset, self.label.region_length, self.label.disk
        )

    def modified(self) -> int | None:
        """When the file was last changed, nanoseconds; None where that cannot be known."""
        if self.file.leaf.is_block_device or not place.is_host(self.path):
            return None
        try:
            return os.stat(self.file.path).st_mtime_ns
        except OSError:
            return None

    def is_where_it_was(self) -> bool:
        """Whether its path still leads to this file, and the file is whole."""
        if place.key_of(self.path) != self.file.key:
            return False
        if self.file.leaf.is_block_device or not place.is_host(self.path):
            return True
        try:
            return os.stat(self.path).st_size >= self.label.size
        except OSError:
            return False

    def write_label(self, *, pool_name: str, disk_name: str, has_left: bool = False) -> None:
        """Replaces the label, durably."""
        label = self.label.next(pool_name=pool_name, disk_name=disk_name, has_left=has_left)
        self.file.leaf.write(label.pack(), label.place)
        self.file.leaf.flush()
        self.label = label

    def close(self) -> None:
        """Closes the file and gives up its lock."""
        self.file.close()

    # ---- the beginning ----

    @classmethod
    def prepare(
        cls, spec: DiskSpec, *, pool: UUID, pool_name: str, slab: int, force: bool
    ) -> PhysicalDisk:
        """Makes or opens the file of a new disk, and checks it; its label is not written yet.

        Raises:
            ExistsError: the file holds something, or belongs to a pool, and ``force`` is not set.
            NoSpaceError: it is too small.
            VhdxError: it cannot be made or opened.
        """
        path = os.fspath(spec.path)
        if place.spelled(path).startswith("space:"):
            raise InvalidArgumentError("a disk of a pool cannot lie in a pool", path=path)
        if spec.size is not None:
            _make_file(path, spec.size)
        file = place.open_file(path, write=True)
        try:
            if spec.size is None and not force:
                _refuse_content(file)
            _check_size(path, file.leaf.size, slab)
            label = new_label(
                pool, uuid4(), size=file.leaf.size // 4096 * 4096, slab=slab,
                pool_name=pool_name, disk_name=spec.name,
            )  # fmt: skip
            return cls(file, label, spec.latency)
        except BaseException:
            file.close()
            raise

    def state(self, index: int, spec: DiskSpec) -> DiskState:
        """What the pool records of it."""
        return DiskState(
            index=index,
            id=self.id,
            name=spec.name,
            path=absolute(spec.path),
            media=spec.media,
            usage=spec.usage,
            size=self.label.size,
            slabs=self.label.slabs,
            slabs_offset=self.label.slabs_offset,
            is_block_device=self.file.leaf.is_block_device,
            latency=spec.latency,
        )

    def write_first_label(self) -> None:
        """Writes the label of a new disk into both places, durably."""
        self.file.leaf.write(bytes(2 * LABEL), 0)
        self.file.leaf.write(self.label.pack(), self.label.place)
        self.file.leaf.flush()


def _make_file(path: str, size: int) -> None:
    """Makes a sparse file of so many bytes; it must not exist."""
    there = place.of(path)
    name = place.spelled(path)
    if there.exists(name):
        raise ExistsError("it exists already", path=path, hint="give no size to use it, or remove it")
    try:
        draft = there.draft(name)
    except FileNotFoundError as error:
        raise NotFoundError("there is no such directory", path=path) from error
    try:
        draft.file.leaf.resize(size)
        draft.file.leaf.flush()
        draft.take(name, replace=False)
        there.sync(os.path.dirname(absolute(name)))
    finally:
        draft.discard()
        draft.file.close()


def _check_size(path: str, size: int, slab: int) -> None:
    _, first, slabs = place_parts(size, slab)
    if slabs < LEAST_SLABS:
        raise NoSpaceError(
            f"a disk of {format_size(size)} has room for {slabs} slabs of {format_size(slab)}, and "
            f"needs {LEAST_SLABS}",
            path=path,
            hint=f"make it {format_size(first + 2 * slab + MIB)} or more, or use smaller slabs",
        )


def _refuse_content(file: ImageFile) -> None:
    head = file.leaf.read(min(MIB, file.leaf.size), 0)
    label = newest_label(head[: 2 * LABEL].ljust(2 * LABEL, b"\0"))
    if label is not None and not label.has_left:
        raise ExistsError(
            f"it is disk {label.disk_name!r} of pool {label.pool_name!r}",
            path=file.path,
            hint="remove it from that pool, or use --force (force=True): the pool loses the disk",
        )
    if label is None and any(head):
        raise ExistsError(
            "it holds data", path=file.path, hint="--force (force=True) gives its content up"
        )


def read_label(file: ImageFile) -> Label:
    """The label of an open file.

    Raises:
        DamagedError: it has none, or the file is shorter than it was.
    """
    if file.leaf.size < 2 * LABEL:
        raise DamagedError("it is no disk of a pool: it is too short", path=file.path)
    label = newest_label(file.leaf.read(2 * LABEL, 0))
    if label is None:
        raise DamagedError("it is no disk of a pool: it has no label", path=file.path)
    if file.leaf.size < label.size:
        raise DamagedError(
            f"the disk is truncated: it has {file.leaf.size} bytes of {label.size}", path=file.path
        )
    return label


def open_all(
    paths: Iterable[str | os.PathLike[str]], *, write: bool
) -> tuple[list[tuple[ImageFile, Label]], dict[str, VhdxError]]:
    """Opens the disks at these paths, each once.

    Returns:
        Those that have a label; and for the others why not.
    """
    found: list[tuple[ImageFile, Label]] = []
    errors: dict[str, VhdxError] = {}
    seen: set[place.Key] = set()
    for path in paths:
        name = os.fspath(path)
        key = place.key_of(name)
        if key is not None and key in seen:
            continue
        try:
            file = place.open_file(name, write=write)
        except VhdxError as error:
            errors[name] = error
            continue
        try:
            found.append((file, read_label(file)))
            seen.add(file.key)
        except VhdxError as error:
            file.close()
            errors[name] = error
    return found, errors
