# SPDX-License-Identifier: MIT
"""Converts images: reads only what the source stores, and writes only what is not zero."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.arrays import np
from vhdx.errors import InvalidArgumentError, Reason, VhdxError
from vhdx.format import vhd
from vhdx.image.creation import format_of_name
from vhdx.image.disk import Disk, ExtentState
from vhdx.image.erasing import erase
from vhdx.image.formats import FORMATS
from vhdx.image.host import HostFile
from vhdx.image.opening import open_disk
from vhdx.image.replacing import new_file
from vhdx.image.reserving import reserve
from vhdx.image.storage import share_storage
from vhdx.image.vhd.footer import find_footer
from vhdx.image.vhd.layout import check_vhd, write_vhd
from vhdx.image.vhd.opening import open_vhd
from vhdx.image.vhdx import layout
from vhdx.image.vhdx.engine import Engine
from vhdx.image.vhdx.structure import read_structure
from vhdx.interrupts import uninterruptible
from vhdx.place import is_host, key_of, of, spelled
from vhdx.units import MIB, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vhdx.image.vhdx.view import View
    from vhdx.interrupts import Progress

    StrPath = str | os.PathLike[str]

__all__ = ["convert", "destination_format"]

_PIECE = 2 * MIB
_WORKERS = 2


def destination_format(path: StrPath, to: str | None) -> str:
    """The format of a destination: ``to``, or the one that its file name suffix stands for.

    Raises:
        InvalidArgumentError: the format is unknown.
    """
    if to is not None:
        if to not in FORMATS:
            raise InvalidArgumentError(
                f"the format {to!r} is unknown", hint=f"use one of {', '.join(FORMATS)}"
            )
        return to
    found = format_of_name(path)
    if found is None and of(path).kind(spelled(path)) == "device":
        return "raw"
    if found is None:
        raise InvalidArgumentError(
            "its name has no suffix of a known format", path=path, hint="specify --to"
        )
    return found


@uninterruptible
def convert(
    source: StrPath,
    destination: StrPath,
    *,
    to: str | None = None,
    format: str | None = None,
    type: str = "dynamic",
    block_size: int | None = None,
    logical_sector_size: int | None = None,
    physical_sector_size: int | None = None,
    azure: bool = False,
    chain: bool = True,
    parent_search: Sequence[StrPath] = (),
    view: View | None = None,
    sparse: bool = True,
    force: bool = False,
    progress: Progress | None = None,
    cancel: Callable[[], bool] | None = None,
) -> int:
    """Copies a disk into a new image.

    The destination is written under a temporary name. It gets its own name when it is complete and
    durable. If the copy fails or is cancelled, nothing is left behind.

    Args:
        source: path of an image.
        destination: path of the new image; an existing file is refused unless ``force``.
        to: "vhdx", "vhd" or "raw"; chosen by the destination's suffix when None, and raw on a block
            device.
        format: format of the source, as in :func:`vhdx.open`.
        type: "dynamic" or "fixed", for VHDX and VHD.
        block_size, logical_sector_size, physical_sector_size: for VHDX; 32 MiB blocks and the
            source's sector sizes when None. A VHD has 2 MiB blocks when None; a logical sector size
            of 512 allows a source with sectors of 4096 bytes.
        azure: make an image that Azure accepts: a fixed VHD whose size is a multiple of 1 MiB.
        chain, parent_search, view: as in :func:`vhdx.open`.
        sparse: leave holes in the host file where the disk is zero.
        force: replace an existing destination.
        progress: called with the bytes done and the bytes that the source stores.
        cancel: called between pieces; the copy stops when it returns True.

    Returns:
        Bytes of zeros that were added to fill the last sector (for Azure, the last MiB); 0 if the
        source's size is a multiple of that.

    Raises:
        VhdxError: as :func:`vhdx.open` and :func:`vhdx.create`; reason CANCELLED when cancelled.
    """
    if not _is_same_file(source, destination) and _share_storage(source, destination):
        raise InvalidArgumentError(
            "source and destination are on the same storage: a disk and its partition, or a loop "
            "device and its file",
            path=destination,
            hint="choose another destination",
        )
    if _is_same_file(source, destination):
        raise InvalidArgumentError(
            "source and destination are the same file",
            path=destination,
            hint="choose another name; vhdx compact makes an image smaller in place",
        )
    named = format_of_name(destination)
    target = "vhd" if azure and to is None and named is None else destination_format(destination, to)
    if azure:
        if target != "vhd":
            raise InvalidArgumentError("Azure takes VHD only", path=destination, hint="name it .vhd")
        type = "fixed"
    with (
        open_disk(
            source, "r", format=format, chain=chain, parent_search=parent_search, view=view
        ) as disk,
        new_file(destination, force=force, sparse=sparse) as leaf,
    ):
        if target == "raw":
            leaf.resize(disk.size)
            erase(leaf, disk.size)
            if not sparse:
                reserve(leaf, 0, disk.size, sparse=True, progress=None, cancel=cancel)
            _Copy(disk, leaf, progress, cancel).run()
            return 0
        if target == "vhd":
            if vhd.SECTOR not in {logical_sector_size, disk.logical_sector_size}:
                raise InvalidArgumentError(
                    "a VHD has sectors of 512 bytes, the source has 4096",
                    path=destination,
                    hint="no guest would find its partitions; --logical-sector 512 converts anyway",
                )
            size = round_up(disk.size, MIB if azure else vhd.SECTOR)
            block = check_vhd(destination, size, type=type, block_size=block_size)
            write_vhd(
                leaf,
                size,
                type=type,
                block_size=block,
                sparse=sparse,
                allocate=False,
                cancel=cancel,
            )
            _fill_vhd(disk, leaf, os.fspath(destination), sparse, progress, cancel)
            return size - disk.size
        logical = disk.logical_sector_size if logical_sector_size is None else logical_sector_size
        size = round_up(disk.size, max(logical, 512))
        parameters = layout.check_parameters(
            destination,
            size,
            type=type,
            block_size=block_size,
            logical_sector_size=logical,
            physical_sector_size=disk.physical_sector_size
            if physical_sector_size is None
            else physical_sector_size,
        )
        layout.write_image(leaf, parameters, sparse=sparse, cancel=cancel)
        host = HostFile(
            os.fspath(destination), leaf, read_only=False, sparse=sparse, key=(0, 0), keep=True
        )
        engine = Engine(
            host, read_structure(host), None, write=True, pool=plane.shared_pool(plane.Level.IMAGE)
        )
        try:
            finish = _hide(leaf)
            _Copy(disk, engine.map, progress, cancel).run()
        finally:
            engine.close()
        finish()
        return size - disk.size


def _share_storage(source: StrPath, destination: StrPath) -> bool:
    return (
        is_host(source)
        and is_host(destination)
        and share_storage(os.fspath(source), os.fspath(destination))
    )


def _hide(leaf: plane.Device) -> Callable[[], None]:
    """On a block device, takes the signature of the image away until the copy is complete.

    Else a crash would leave an image that opens and holds a part of the disk. Returns what writes it.
    """
    if not leaf.is_block_device:
        return lambda: None
    signature = leaf.read(4096, 0)
    leaf.write(bytes(4096), 0)
    leaf.flush()

    def finish() -> None:
        leaf.flush()
        leaf.write(signature, 0)
        leaf.flush()

    return finish


def _is_same_file(source: StrPath, destination: StrPath) -> bool:
    key = key_of(source)
    return key is not None and key == key_of(destination)


def _fill_vhd(
    disk: Disk,
    leaf: plane.Device,
    path: str,
    sparse: bool,
    progress: Progress | None,
    cancel: Callable[[], bool] | None,
) -> None:
    """Copies the disk into the empty VHD in ``leaf``."""
    host = HostFile(path, leaf, read_only=False, sparse=sparse, key=(0, 0), keep=True)
    footer = find_footer(leaf)
    assert footer is not None
    image = open_vhd(
        host,
        footer,
        write=True,
        chain=False,
        parent_search=(),
        pool=plane.shared_pool(plane.Level.IMAGE),
    )
    try:
        _Copy(disk, image.device, progress, cancel).run()
    finally:
        image.close()


def _pieces(disk: Disk) -> Iterator[tuple[int, int]]:
    for extent in disk.extents():
        if extent.state is not ExtentState.DATA:
            continue
        end = extent.offset + extent.length
        at = extent.offset
        while at < end:
            # Ends at a multiple of the piece size, so that pieces and blocks are aligned.
            stop = min(end, (at // _PIECE + 1) * _PIECE)
            yield at, stop - at
            at = stop


class _Copy:
    """Copies the pieces of a disk into a new image; zeros are not written.

    Workers take pieces in order. Each worker reads and writes its own pieces, so one reads while
    another writes. The host serialises writes to one file, so more than two workers do not help.
    """

    def __init__(
        self,
        disk: Disk,
        target: plane.Device,
        progress: Progress | None,
        cancel: Callable[[], bool] | None,
    ) -> None:
        self._disk, self._target = disk, target
        self._progress, self._cancel = progress, cancel
        self._total = sum(e.length for e in disk.extents() if e.state is ExtentState.DATA)
        self._pieces = _pieces(disk)
        self._lock = threading.Lock()  # guards pieces, done and failure
        self._done = 0
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Copies all pieces and makes them durable.

        Raises:
            VhdxError: the first failure of any worker; reason CANCELLED when cancelled.
        """
        others = [
            threading.Thread(target=self._work, name=f"convert-{n}") for n in range(1, _WORKERS)
        ]
        for thread in others:
            thread.start()
        try:
            self._work(first=True)
        finally:
            with self._lock:
                self._pieces = iter(())
            for thread in others:
                thread.join()
        if self._failure is not None:
            raise self._failure
        self._tell(self._total)  # other workers do not report their pieces
        self._target.flush()

    def _take(self) -> tuple[int, int] | None:
        with self._lock:
            return None if self._failure is not None else next(self._pieces, None)

    def _work(self, *, first: bool = False) -> None:
        """Copies pieces until none are left; the first worker runs on the caller's thread."""
        buffer = memoryview(bytearray(_PIECE))
        try:
            while (piece := self._take()) is not None:
                offset, length = piece
                data = buffer[:length]
                self._disk.preadinto(data, offset)
                _write_data(self._target, data, offset)
                self._note(length, tell=first)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error

    def _note(self, length: int, *, tell: bool) -> None:
        with self._lock:
            self._done += length
            done = self._done
        if tell:
            self._tell(done)

    def _tell(self, done: int) -> None:
        if self._cancel is not None and self._cancel():
            raise VhdxError(
                "the conversion was stopped; nothing was left behind",
                reason=Reason.CANCELLED,
                path=self._disk.path,
            )
        if self._progress is not None:
            self._progress(done, self._total)


_GRAIN = 64 << 10


def _write_data(target: plane.Device, data: memoryview, offset: int) -> None:
    """Writes ``data``, except for grains of 64 KiB that are all zero."""
    for start, end in _not_zero(data):
        target.write(data[start:end], offset + start)


def _not_zero(data: memoryview) -> Iterator[tuple[int, int]]:
    """Start and end (bytes) of each run of grains that are not all zero."""
    grains = -(-len(data) // _GRAIN)
    wanted = np.ones(grains, np.bool_)
    whole = len(data) // _GRAIN
    if whole:
        words = np.frombuffer(data[: whole * _GRAIN], np.uint64)
        wanted[:whole] = words.reshape(whole, -1).any(axis=1)
    if whole < grains:
        wanted[whole] = np.frombuffer(data[whole * _GRAIN :], np.uint8).any()
    edges = np.flatnonzero(np.diff(np.concatenate(([False], wanted, [False])).astype(np.int8)))
    for start, end in edges.reshape(-1, 2).tolist():
        yield start * _GRAIN, min(end * _GRAIN, len(data))
