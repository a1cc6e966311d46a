# SPDX-License-Identifier: MIT
"""An open VHDX image: its engine, and the chain of parents under it."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhdx import lazy, plane
from vhdx.errors import (
    DamagedError,
    InUseError,
    InvalidArgumentError,
    MissingParentError,
    NotFoundError,
    ReadOnlyError,
    Reason,
    VhdxError,
)
from vhdx.format import header as headers
from vhdx.format import region
from vhdx.image.children import note_child
from vhdx.image.host import open_file
from vhdx.image.parents import Missing, existing
from vhdx.image.partitions import read_partitions
from vhdx.image.vhdx import journal
from vhdx.image.vhdx.allocation import block_counts, survey
from vhdx.image.vhdx.children import guard_parent
from vhdx.image.vhdx.engine import Engine
from vhdx.image.vhdx.overlay import ReplayedFile
from vhdx.image.vhdx.parents import candidates, mismatch
from vhdx.image.vhdx.parents import parent_info as describe_parent
from vhdx.image.vhdx.qemu_shifted_bat import refuse_shifted_pages
from vhdx.image.vhdx.structure import Structure, read_structure
from vhdx.image.vhdx.view import AS_SPECIFIED, View
from vhdx.interrupts import caller
from vhdx.place import ImageFile, real

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from uuid import UUID

    from vhdx.image import gpt
    from vhdx.image.vhdx import compacting, resizing, snapshots
    from vhdx.interrupts import Progress
else:  # an operation loads what only it takes
    compacting = lazy.Module("vhdx.image.vhdx.compacting")
    gpt = lazy.Module("vhdx.image.gpt")
    resizing = lazy.Module("vhdx.image.vhdx.resizing")
    snapshots = lazy.Module("vhdx.image.vhdx.snapshots")

__all__ = ["VhdxImage", "is_vhdx", "open_layer", "open_vhdx", "prepare_for_writing"]

_LONGEST_CHAIN = 256


class VhdxImage:
    """An open VHDX image.

    Attributes:
        engine: the engine of this layer's file.
        parent: the opened parent image, or None.
        parent_info: path, linkage and found for a differencing image, else None.
    """

    name = "vhdx"

    def __init__(
        self,
        engine: Engine,
        parent: VhdxImage | None,
        parent_info: dict[str, Any] | None,
        *,
        log_was_dirty: bool,
        pool: plane.Pool,
        frozen: bool = False,
    ) -> None:
        parameters = engine.structure.parameters
        self.engine = engine
        self.parent = parent
        self.parent_info = parent_info
        self._pool = pool
        self._changing = threading.Lock()
        self._changer: object = None  # the caller that holds _changing
        self._real_path = real(engine.host.path)
        fixed = frozen or engine.host.read_only
        self._switch = (
            None if fixed else plane.Switch(engine.map, plane.shared_pool(plane.Level.DISK))
        )
        self.device: plane.Device = engine.map if self._switch is None else self._switch
        self.path = engine.host.path
        self.read_only = engine.host.read_only
        self.block_size = parameters.block_size
        self.logical_sector_size = parameters.logical_sector_size
        self.physical_sector_size = parameters.physical_sector_size
        self._log_was_dirty = log_was_dirty

    @property
    def kind(self) -> str:
        """The type: "dynamic", "fixed" or "differencing"."""
        parameters = self.engine.structure.parameters
        if parameters.has_parent:
            return "differencing"
        return "fixed" if parameters.leave_blocks_allocated else "dynamic"

    def describe(self) -> dict[str, Any]:
        """Returns the layer's properties; commits first, so that the block counts are current."""
        if not self.read_only:
            self.device.flush()
        structure, header = self.engine.structure, self.engine.header
        return {
            "type": self.kind,
            "file_size": self.engine.host.leaf.size,
            "allocated_size": self.engine.host.allocated(),
            "creator": structure.creator,
            "disk_id": str(structure.parameters.disk_id),
            "data_write_id": str(header.data_write_guid),
            "log_dirty": self._log_was_dirty,
            "parent": self.parent_info,
            "blocks": block_counts(structure, self.engine.host.leaf),
            "minimum_size": self.minimum_size,
        }

    @property
    def key(self) -> tuple[int, int]:
        """(device, inode) of this layer's file."""
        return self.engine.host.key

    @property
    def minimum_size(self) -> int | None:
        """Smallest size in bytes that keeps every partition; None if it is unknown."""
        sector = self.logical_sector_size
        try:
            table = read_partitions(self.device.read, self.device.size, sector)
        except VhdxError:
            return None  # the parents were not opened, or the data is damaged
        return None if table is None else table.minimum_size(sector)

    def snapshot(self, checkpoint: str | os.PathLike[str] | None) -> str:
        """Makes the file the parent of a fresh child; see :meth:`vhdx.Disk.snapshot`."""
        if self._switch is None:
            raise ReadOnlyError("it is open for reading only", path=self.path)
        name = snapshots.checkpoint_path(self._real_path, checkpoint)
        with self._alone("snapshot"), self.engine.structure_lock:
            old = self.engine
            snapshots.check_place(self._real_path, name, old)
            old.open_gate()  # its DataWriteGuid does not change after this
            # Child hints come first: a stale hint is harmless, a missing one is not.
            note_child(self._real_path, self._real_path, of=name)
            if self.parent is not None:
                note_child(self.parent.engine.host.path, name)
            with snapshots.fresh_child(self._real_path, name, old, self._pool) as child:
                old.map.flush()  # writes most changes before requests are paused
                with self._switch.paused():
                    old.map.flush()
                    with snapshots.second_name(self._real_path, name):
                        child.take_name()
                    # The snapshot is final now: a later failure poisons the child.
                    failure = child.settle(self._switch, old, name)
                    child.engine.host.path = self.path
                    self._follow(old, child.engine, name)
        if failure is not None:
            raise failure
        return os.fspath(name)

    def _follow(self, old: Engine, new: Engine, name: Path) -> None:
        """Makes ``new`` the engine of this image, and ``old``, now at ``name``, its parent."""
        base = VhdxImage(
            old, self.parent, self.parent_info, log_was_dirty=False, pool=self._pool, frozen=True
        )
        self.engine, self.parent = new, base
        self.parent_info = describe_parent(new.structure, os.fspath(name))
        self.block_size = new.structure.parameters.block_size

    @contextlib.contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Allows one change of the structure at a time; a second one is refused at once."""
        if not self._changing.acquire(blocking=False):
            raise InUseError(
                f"a {what} is not possible while another operation changes its structure",
                path=self.path,
                hint="wait for the other operation",
            )
        self._changer = caller()
        try:
            yield
        finally:
            self._changer = None
            self._changing.release()

    def compact(
        self,
        progress: Progress | None,
        cancel: Callable[[], bool] | None,
        pace: Callable[[int], None] | None,
    ) -> compacting.Compacted:
        """Gives space back to the host while the disk is in use; see :meth:`vhdx.Disk.compact`."""
        if self._switch is None:
            raise ReadOnlyError("it is open for reading only", path=self.path)
        with self._alone("compaction"):
            return compacting.compact(self.engine, progress, cancel, pace)

    @property
    def has_released(self) -> bool:
        """Whether space of trimmed and zeroed blocks waits for a commit."""
        return self.engine.has_released

    def chain(self) -> list[dict[str, Any]]:
        """This layer and those below it, for ``vhdx info --chain``."""
        header = self.engine.header
        here = {
            "path": self.engine.host.path,
            "type": self.kind,
            "virtual_size": self.engine.structure.parameters.virtual_size,
            "block_size": self.block_size,
            "file_size": self.engine.host.leaf.size,
            "data_write_id": str(header.data_write_guid),
        }
        return [here, *([] if self.parent is None else self.parent.chain())]

    def extents(self, offset: int, length: int) -> Iterator[plane.RawExtent]:
        """Yields extents that cover the range in order; adjacent ones may have the same state.

        Ranges that this layer does not store are not looked up in its BAT. They come from the
        parent, or are holes.
        """
        end = offset + length
        if offset < 0 or length < 0 or end > self.device.size or self._is_alone:
            yield from self.device.extents(offset, length)
            return
        for start, stop in self.engine.loader.stored_ranges():
            if stop <= offset:
                continue
            if offset < start:
                yield from self._below(offset, min(start, end))
                offset = start
            if offset >= end:
                return
            yield from self.device.extents(offset, min(stop, end) - offset)
            offset = stop
        if offset < end:
            yield from self._below(offset, end)

    @property
    def _is_alone(self) -> bool:
        """Whether its parent was not opened, so that the content of absent blocks is unknown."""
        return self.parent is None and self.engine.structure.parent is not None

    def _below(self, start: int, end: int) -> Iterator[plane.RawExtent]:
        """Yields the extents of a range that this layer does not store."""
        present = start
        if self.parent is not None:
            present = max(start, min(end, self.parent.device.size))
            for each in self.parent.extents(start, present - start):
                yield each if each.depth < 0 else each._replace(depth=each.depth + 1)
        if present < end:
            yield plane.RawExtent(present, end - present, plane.HOLE, -1)

    def resize(self, size: int, *, shrink: bool, unsafe: bool, move_gpt: bool) -> str | None:
        """Changes the virtual size while the disk is in use; see :meth:`vhdx.Disk.resize`."""
        if self._switch is None:
            raise ReadOnlyError("it is open for reading only", path=self.path)
        with self._alone("resize"):
            now = self.device.size
            if size > now:
                return self._grow(now, size, move_gpt=move_gpt)
            if size < now:
                self._shrink(now, size, shrink=shrink, unsafe=unsafe, move_gpt=move_gpt)
            elif move_gpt and (moved := self._plan_move(now, size)) is not None:
                self._move_gpt(moved)  # an earlier grow did not move the GPT
            return None

    def _grow(self, now: int, size: int, *, move_gpt: bool) -> str | None:
        assert self._switch is not None
        # Plan the move first: its errors must come before anything changes.
        moved = self._plan_move(now, size) if move_gpt else None
        with self.engine.structure_lock:
            resizing.grow(self.engine, size)
            self.engine.map.resize(size)
            self._switch.follow()
        if moved is not None:
            self._move_gpt(moved)
        table = read_partitions(self.device.read, now, self.logical_sector_size)
        if move_gpt or table is None or table.kind != "gpt":
            return None
        return (
            "its backup GPT is still at the old end of the disk; the guest has to move it "
            "(sgdisk -e, or the disk tool of Windows), or stop the guest and repeat this resize "
            "with --move-gpt"
        )

    def _shrink(self, now: int, size: int, *, shrink: bool, unsafe: bool, move_gpt: bool) -> None:
        assert self._switch is not None
        if not shrink:
            raise InvalidArgumentError(
                f"it has {now} bytes, so a resize to {size} bytes would cut some off",
                path=self.path,
                hint="use --shrink (shrink=True) if that is what you want",
            )
        below = None if self.parent is None else self.parent.device.size
        engine = self.engine
        resizing.check_shrink(engine, self.device, size, below, unsafe=unsafe, move_gpt=move_gpt)
        moved = self._plan_move(now, size) if move_gpt else None
        if moved is not None:
            self._move_gpt(moved)
        with engine.structure_lock:
            with self._switch.paused():
                engine.map.resize(size)
                self._switch.follow()
            try:
                resizing.shrink(engine, size)
            finally:
                with self._switch.paused():
                    engine.map.resize(engine.structure.parameters.virtual_size)
                    self._switch.follow()

    def _plan_move(self, now: int, size: int) -> gpt.Moved | None:
        try:
            return gpt.plan_move(self.device.read, now, size, self.logical_sector_size)
        except InvalidArgumentError as error:
            error.path = self.path
            raise

    def _move_gpt(self, moved: gpt.Moved) -> None:
        """Writes the backup, then the primary that refers to it."""
        for part in (moved.backup, moved.primary):
            for offset, data in part:
                self.device.write(data, offset)
            self.device.flush()

    def close(self) -> None:
        """Closes this layer, then its parents, even if this layer fails to close.

        Waits until a structure change by another thread is done.
        """
        if self._changer == caller():
            raise InUseError("an operation that changes it cannot close it", path=self.path)
        with self._changing:
            try:
                self.engine.close()
            finally:
                if self.parent is not None:
                    self.parent.close()


def open_vhdx(
    host: ImageFile,
    *,
    write: bool,
    chain: bool,
    parent_search: Sequence[str],
    pool: plane.Pool,
    force: bool = False,
    view: View = AS_SPECIFIED,
) -> VhdxImage:
    """Opens the VHDX in ``host``, and takes ownership of ``host`` even on failure.

    Args:
        host: the file, open for writing if ``write`` is set.
        write: replay the log into the file, and allow changes.
        chain: open the parents; without them, reading a sector that this layer lacks raises
            MissingParentError.
        parent_search: further directories to search for parents.
        pool: runs background work.
        force: allow writing although another image is based on it, or QEMU's bug 727 moved
            entries of its BAT.
        view: which copies of the structures to read, in this layer only.
    """
    search = tuple(parent_search)
    return _open(host, write, chain, search, pool, {host.key}, force=force, view=view)


def _open(
    host: ImageFile,
    write: bool,
    chain: bool,
    search: tuple[str, ...],
    pool: plane.Pool,
    seen: set[tuple[int, int]],
    *,
    force: bool = False,
    data_write_guid: UUID | None = None,
    view: View = AS_SPECIFIED,
) -> VhdxImage:
    parent: VhdxImage | None = None
    try:
        structure = read_structure(host, view)
        if write and not force:
            guard_parent(host.path, structure)
            refuse_shifted_pages(structure, host.leaf)
        info: dict[str, Any] | None = None
        lower: plane.Device | None = None
        if structure.parent is not None:
            if chain:
                parent, info = _open_parent(host, structure, search, pool, seen)
                lower = parent.device
            else:
                why = MissingParentError("its parents were not opened (chain=False)")
                lower = plane.Callback(
                    Missing(host.path, why), structure.geometry.virtual_size, read_only=True
                )
                info = describe_parent(structure, None)
        dirty = structure.header.log_guid != headers.NIL
        if write:
            structure = prepare_for_writing(host, structure)
            if _mend_region_table(host, structure):
                structure = read_structure(host)
        engine = Engine(
            host,
            structure,
            lower,
            write=write,
            pool=pool,
            data_write_guid=data_write_guid,
            data=_replayed(host, structure, pool),
        )
    except BaseException as error:
        host.close()
        if parent is not None:
            parent.close()
        if isinstance(error, VhdxError) and error.path is None:
            error.path = host.path
        raise
    return VhdxImage(engine, parent, info, log_was_dirty=dirty and not write, pool=pool)


def _replayed(host: ImageFile, structure: Structure, pool: plane.Pool) -> plane.Device | None:
    """The file with its log replayed in memory; None if only BAT or metadata change."""
    if structure.sequence is None:
        return None
    regions = [(r.offset, r.end) for r in (structure.bat, structure.metadata_region)]
    if structure.overlay.covers_only(regions):
        return None
    replayed = ReplayedFile(host.leaf, structure.overlay, pool, host.path)
    return replayed.device


def open_layer(host: ImageFile, *, search: Sequence[str], data_write_guid: UUID) -> VhdxImage:
    """Opens an image for writing, even if other images are based on it.

    Its first change sets the DataWriteGuid to ``data_write_guid``. The image takes ownership of
    ``host``, even on failure.
    """
    pool = plane.shared_pool(plane.Level.IMAGE)
    return _open(
        host, True, True, tuple(search), pool, {host.key}, force=True, data_write_guid=data_write_guid
    )


def prepare_for_writing(host: ImageFile, structure: Structure) -> Structure:
    """Replays the log into the file; returns the resulting structure.

    Raises:
        DamagedError: it has no usable log, or must not be changed.
    """
    header = structure.header
    for refusal in structure.refusals:
        raise refusal
    if header.log_length == 0:
        raise DamagedError(
            "it has no log, so it cannot be changed safely",
            reason=Reason.LOG_LOCATION,
            path=host.path,
            hint="convert it into a new image",
        )
    if header.log_offset + header.log_length > host.leaf.size:
        raise DamagedError(
            "the log lies outside the file",
            reason=Reason.TRUNCATED,
            path=host.path,
            offset=header.log_offset,
        )
    if structure.sequence is not None:
        survey(structure, host.leaf)  # refuses a damaged BAT before anything changes
        journal.replay_to_file(host.leaf, header, structure.sequence)
        structure = read_structure(host)
    return structure


def _mend_region_table(host: ImageFile, structure: Structure) -> bool:
    """Overwrites a damaged copy of the region table with the valid one ([MS-VHDX] 2.2.3).

    The content of the disk does not change, so the DataWriteGuid stays.
    """
    tables = [host.leaf.read(region.TABLE_SIZE, at) for at in region.TABLE_OFFSETS]
    damaged = [region.parse_table(table) is None for table in tables]
    if damaged[0] == damaged[1]:
        return False
    at, good = region.TABLE_OFFSETS[damaged[1]], tables[damaged[0]]
    survey(structure, host.leaf)  # refuses a damaged BAT before anything changes
    journal.change_once(host.leaf, structure.header, at, good)
    return True


def _open_parent(
    host: ImageFile,
    structure: Structure,
    search: tuple[str, ...],
    pool: plane.Pool,
    seen: set[tuple[int, int]],
) -> tuple[VhdxImage, dict[str, Any]]:
    if len(seen) >= _LONGEST_CHAIN:
        raise MissingParentError(
            f"the chain of parents is longer than {_LONGEST_CHAIN}",
            reason=Reason.PARENT_DEPTH,
            path=host.path,
        )
    refusals: list[VhdxError] = []
    assert structure.parent is not None
    for candidate in candidates(host.path, structure.parent, search):
        path = existing(candidate)
        if path is None:
            continue
        try:
            below = open_file(path, write=False)
        except NotFoundError:
            continue
        if below.key == host.key:
            below.close()
            continue
        if below.key in seen:
            below.close()
            refusals.append(
                MissingParentError(
                    f"the chain of parents loops back to {path}",
                    reason=Reason.PARENT_CYCLE,
                    path=host.path,
                )
            )
            continue
        try:
            parent = _open(below, False, True, search, pool, seen | {below.key})
        except VhdxError as error:
            refusals.append(error)
            continue
        refusal = mismatch(host, structure, parent.path, parent.engine.structure)
        if refusal is None:
            return parent, describe_parent(structure, str(path))
        parent.close()
        refusals.append(refusal)
    if refusals:
        raise refusals[0]
    assert structure.parent is not None
    named = ", ".join(value for _, value in structure.parent.paths) or "no path at all"
    raise MissingParentError(
        f"its parent was not found (it names {named})",
        path=host.path,
        hint="put the parent beside it, or say where it is with --parent-dir (parent_search=); "
        "--no-chain (chain=False) shows this layer alone",
    )


def is_vhdx(leaf: plane.Device) -> bool:
    """Whether the file begins with the VHDX signature ([MS-VHDX] 2.2.1)."""
    return leaf.size >= len(headers.SIGNATURE) and leaf.read(8, 0) == headers.SIGNATURE
