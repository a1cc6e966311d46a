# SPDX-License-Identifier: MIT
"""Offline operations that keep an image's content: merge, rebase, compaction.

Merge. The child's content is copied into the parent's file, which then takes the child's name. That
file also takes the child's DataWriteGuid, because it has the child's content. So images that are
based on the child stay valid. Before anything is copied, the child is made to accept that GUID as
its parent's (parent_linkage2, [MS-VHDX] 2.6.2.6.3). So the child opens and reads the same at every
moment of the merge, and an interrupted merge can be repeated.
"""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from vhdx import place, plane
from vhdx.errors import (
    HostIOError,
    InUseError,
    InvalidArgumentError,
    MissingParentError,
    NoSpaceError,
    Reason,
    UnsupportedError,
    VhdxError,
)
from vhdx.format import locator, metadata
from vhdx.image.children import note_child
from vhdx.image.host import open_file
from vhdx.image.vhdx import resizing
from vhdx.image.vhdx.children import children_of
from vhdx.image.vhdx.differencing import locator_for
from vhdx.image.vhdx.engine import Engine
from vhdx.image.vhdx.image import open_layer, open_vhdx, prepare_for_writing
from vhdx.image.vhdx.structure import read_structure
from vhdx.interrupts import uninterruptible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from uuid import UUID

    from vhdx.image.contract import Compacted
    from vhdx.image.vhdx.image import VhdxImage
    from vhdx.image.vhdx.layout import StrPath
    from vhdx.image.vhdx.structure import Structure
    from vhdx.interrupts import Cancel, Progress
    from vhdx.place import ImageFile

__all__ = ["compact", "merge", "rebase"]

_PIECE = 4 << 20


@uninterruptible
def merge(
    path: StrPath,
    *,
    parent_search: Sequence[StrPath] = (),
    force: bool = False,
    keep_parent_name: bool = False,
    progress: Progress | None = None,
    cancel: Callable[[], bool] | None = None,
) -> None:
    """Merges a differencing image into its parent; the result has the name of the image.

    The parent's own name is gone afterwards, or the image's with ``keep_parent_name``. Images based
    on the merged image stay valid. Other images based on the parent become invalid, so the merge is
    refused if one is found. After an interruption or cancellation the image reads as before; merge
    it again.

    Args:
        path: of the differencing image.
        parent_search: further directories to look for the parent in.
        force: merge although other images are based on the parent, or one of the two files has a
            second hard link; those images and links become unusable.
        keep_parent_name: the result has the name of the parent, as with qemu-img commit.
        progress: called with the bytes done and the bytes in all.
        cancel: called between pieces; the merge stops when it returns True.

    Raises:
        InvalidArgumentError: it is not a differencing image.
        InUseError: one of the two is in use, or another image is based on the parent.
        VhdxError: as :func:`vhdx.open`; reason CANCELLED when cancelled.
    """
    name, there = place.real(path), place.of(path)
    search = [os.fsdecode(each) for each in parent_search]
    with contextlib.ExitStack() as stack:
        # The lock keeps other writers out from the first check to the rename.
        guard = open_file(name, write=True)
        stack.callback(guard.close)
        parent_path = _parent_of(name, search)
        _check_names(name, parent_path)
        there.check_replaceable(name)
        if not force:
            _check_links(name, parent_path)
            _check_siblings(name, parent_path)
            if keep_parent_name:
                _check_children(name)
        guid = _accept_own_guid(name, parent_path)
        base = open_layer(open_file(parent_path, write=True), search=search, data_write_guid=guid)
        stack.callback(base.close)
        if not force:
            _check_siblings(name, parent_path)  # again: its lock now prevents new children
        _merge_into(base, name, progress, cancel)
        if keep_parent_name:
            _remove_child(name, parent_path)
        else:
            _take_name(base, name, parent_path)
        there.sync(os.path.dirname(name))


def _remove_child(name: str, parent_path: str) -> None:
    """Removes the image, whose content the parent has by now."""
    try:
        place.of(name).remove(name)
    except OSError as error:
        raise HostIOError(
            f"it is merged into {parent_path}, but it cannot be removed: {error.strerror}",
            path=name,
            hint="it is not needed any more",
        ) from error


def _take_name(base: VhdxImage, name: str, parent_path: str) -> None:
    """Renames the parent's file, which has the content of both, over the image."""
    for other in _others_based_on(name):
        note_child(parent_path, other)
    if base.parent is not None:
        note_child(base.parent.engine.host.path, name)
    there = place.of(name)
    try:
        there.keep_attributes(name, parent_path)
        there.rename(parent_path, name)
    except OSError as error:
        if isinstance(error, VhdxError):
            raise
        raise HostIOError(
            f"it is merged, but {parent_path} cannot take its name: {error.strerror}",
            path=name,
            hint=f"it reads as before, and {parent_path} has the merged content; merge again "
            "under a name that can be replaced (a file that is a mount point cannot)",
        ) from error


def _others_based_on(path: str) -> list[Path]:
    """Images that are based on the image at ``path``."""
    host = open_file(path, write=False, locked=False)
    try:
        return list(children_of(path, read_structure(host)))
    finally:
        host.close()


def _merge_into(
    base: VhdxImage,
    name: str,
    progress: Progress | None,
    cancel: Callable[[], bool] | None,
) -> None:
    child = open_file(name, write=False, locked=False)
    try:
        structure = read_structure(child)
        size = structure.parameters.virtual_size
        if size < base.engine.map.size:
            raise UnsupportedError("it is smaller than its parent", path=name)
        top = Engine(
            child, structure, base.engine.map, write=False, pool=plane.shared_pool(plane.Level.IMAGE)
        )
    except BaseException:
        child.close()
        raise
    try:
        if size > base.engine.map.size:
            resizing.grow(base.engine, size)
            base.engine.map.resize(size)
        base.engine.open_gate()  # even if nothing is copied: it sets the child's GUID
        _copy_down(top, base.engine.map, name, progress, cancel)
    finally:
        top.close()


def _parent_of(name: str, search: list[str]) -> str:
    """The real path of the parent, whose linkage fits."""
    probe = open_vhdx(
        open_file(name, write=False, locked=False),
        write=False,
        chain=True,
        parent_search=search,
        pool=plane.shared_pool(plane.Level.IMAGE),
    )
    try:
        if probe.parent is None:
            raise InvalidArgumentError("it has no parent to merge into", path=name)
        return place.real(probe.parent.path)
    finally:
        probe.close()


def _accept_own_guid(name: str, parent_path: str) -> UUID:
    """Makes the child accept its own DataWriteGuid, besides the parent's, as parent linkage."""
    host = open_file(name, write=True, locked=False)
    try:
        structure = prepare_for_writing(host, read_structure(host))
        assert structure.parent is not None
        guid = structure.header.data_write_guid
        parent = open_file(parent_path, write=False)
        try:
            now = read_structure(parent).header.data_write_guid
        finally:
            parent.close()
        entries = dict(structure.parent.entries)
        entries["parent_linkage"], entries["parent_linkage2"] = f"{{{now}}}", f"{{{guid}}}"
        if entries != structure.parent.entries:
            engine = _alone(host, structure)
            try:
                _set_locator(engine, locator.ParentLocator(entries))
            finally:
                engine.close()
        return guid
    finally:
        host.close()


def _alone(host: ImageFile, structure: Structure) -> Engine:
    """An engine without the parent, for changes of metadata that keep the content and the GUID."""
    nothing = plane.Memory(0, 0)
    return Engine(
        host,
        structure,
        nothing,
        write=True,
        pool=plane.shared_pool(plane.Level.IMAGE),
        data_write_guid=structure.header.data_write_guid,
    )


def _set_locator(engine: Engine, new: locator.ParentLocator) -> None:
    """Replaces the parent locator in one log entry."""
    packed, base = locator.pack_locator(new), engine.structure.metadata_region
    items = engine.structure.items
    index = next(i for i, item in enumerate(items) if item.guid == metadata.PARENT_LOCATOR)
    item, at = items[index], items[index].offset
    if len(packed) > item.length:
        at = max(each.offset + each.length for each in items)
        if at + len(packed) > base.length:
            raise NoSpaceError("its metadata has no room for the locator", path=engine.host.path)
    entry = base.offset + 32 + 32 * index + 16  # offset and length follow the GUID
    with engine.changing() as leaf:
        leaf.flush()
        engine.committer.log(
            [(base.offset + at, packed), (entry, struct.pack("<II", at, len(packed)))]
        )


def _check_names(name: str, parent_path: str) -> None:
    there = place.of(name)
    for each in (name, parent_path):
        if place.of(each).kind(each) == "device":
            raise UnsupportedError(
                f"{each} is a block device, which cannot be renamed",
                path=name,
                hint="convert the image instead",
            )
    apart = place.of(parent_path) is not there
    if apart or there.key(name)[0] != there.key(parent_path)[0]:  # of another device
        raise UnsupportedError(
            f"its parent {parent_path} is in another file system",
            path=name,
            hint="convert it instead, or move the parent beside it",
        )
    directories = {Path(place.real(p)).parent for p in (name, parent_path)}
    if len(directories) > 1:
        host = open_file(parent_path, write=False)
        try:
            differencing = read_structure(host).parent is not None
        finally:
            host.close()
        if differencing:
            raise UnsupportedError(
                f"its parent {parent_path} is in another directory and has a parent itself",
                path=name,
                hint="move them together",
            )


def _check_links(name: str, parent_path: str) -> None:
    """Refuses a merge after which a second hard link would show other content, or not open."""
    for each in (name, parent_path):
        if place.of(each).links(each) > 1:
            raise UnsupportedError(
                f"{each} has a second name (a hard link), which the merge would leave behind",
                path=name,
                hint="remove that name, or use --force (force=True) if it is not needed",
            )


def _check_siblings(name: str, parent_path: str) -> None:
    for other in _others_based_on(parent_path):
        if place.key_of(other) != place.key_of(name):
            raise InUseError(
                f"{other} is based on the same parent and would be lost",
                path=name,
                hint="use --force (force=True) if it is not needed",
            )


def _check_children(name: str) -> None:
    """Refuses to remove an image that others are based on."""
    for other in _others_based_on(name):
        raise InUseError(
            f"{other} is based on it and would be lost with its name",
            path=name,
            hint="use --force (force=True) if it is not needed",
        )


def _pieces(top: Engine, state: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Yields state, offset and length of each piece that the upper layer holds in ``state``."""
    for start, end in top.loader.stored_ranges():
        for extent in top.map.extents(start, end - start):
            if extent.state not in state or extent.depth > 0:
                continue
            for at in range(extent.offset, extent.offset + extent.length, _PIECE):
                yield extent.state, at, min(_PIECE, extent.offset + extent.length - at)


def _copy_down(
    top: Engine,
    base: plane.Device,
    name: str,
    progress: Progress | None,
    cancel: Callable[[], bool] | None,
) -> None:
    total = sum(length for _, _, length in _pieces(top, (plane.DATA,)))
    buffer, done = bytearray(_PIECE), 0
    for state, at, length in _pieces(top, (plane.DATA, plane.ZERO, plane.HOLE)):
        if cancel is not None and cancel():
            raise VhdxError(
                "the merge was stopped; the image reads as before",
                reason=Reason.CANCELLED,
                path=name,
                hint="merge it again",
            )
        if state == plane.DATA:
            part = memoryview(buffer)[:length]
            top.map.read_into(part, at)
            base.write(part, at)
            done += length
            if progress is not None:
                progress(done, total)
        elif any(e.state == plane.DATA for e in base.extents(at, length)):
            base.zero(at, length)  # trimmed or zeroed in the child: clears the parent's data
    base.flush()


@uninterruptible
def rebase(
    path: StrPath,
    parent: StrPath,
    *,
    parent_search: Sequence[StrPath] = (),
    unsafe: bool = False,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> None:
    """Gives a differencing image another parent, and keeps its content.

    If the new parent is the old one under another name, only the locator changes. Otherwise data
    that would read differently through the new parent is first copied into the image.

    Args:
        path: of the differencing image.
        parent: the new parent.
        parent_search: further directories to search for parents.
        unsafe: assume that both parents have the same content, and copy nothing.
        progress: called with the bytes compared and the bytes in all.
        cancel: called between pieces; when it returns True, the image keeps its old parent and
            reads as before.

    Raises:
        InvalidArgumentError: it is not a differencing image, or the new parent is larger.
        MissingParentError: the old parent is missing, so nothing can be compared; or the new
            parent has a different logical sector size.
        InUseError: one of the images is in use.
    """
    name = os.fsdecode(path)
    search = [os.fsdecode(each) for each in parent_search]
    pool = plane.shared_pool(plane.Level.IMAGE)
    own = place.key_of(name)
    if own is not None and own == place.key_of(parent):
        raise InvalidArgumentError("it would be its own parent", path=name)
    with contextlib.ExitStack() as stack:
        host = open_file(name, write=True)
        stack.callback(host.close)
        structure = prepare_for_writing(host, read_structure(host))
        if structure.parent is None:
            raise InvalidArgumentError("it has no parent", path=name)
        new = open_vhdx(
            open_file(parent, write=False), write=False, chain=True, parent_search=search, pool=pool
        )
        stack.callback(new.close)
        if any(place.key_of(layer["path"]) == own for layer in new.chain()):
            raise InvalidArgumentError("it would be its own parent", path=name)
        parameters = new.engine.structure.parameters
        if parameters.logical_sector_size != structure.parameters.logical_sector_size:
            raise MissingParentError(
                f"{parent} has another logical sector size", reason=Reason.PARENT_MISMATCH, path=name
            )
        if new.device.size > structure.parameters.virtual_size:
            raise InvalidArgumentError(f"{parent} is larger", path=name)
        linkage = new.engine.header.data_write_guid
        old: VhdxImage | None = None
        if unsafe or linkage in structure.parent.linkages:
            engine = _alone(host, structure)
        else:
            old = open_vhdx(
                open_file(name, write=False, locked=False),
                write=False,
                chain=True,
                parent_search=search,
                pool=pool,
            )
            stack.callback(old.close)
            assert old.parent is not None
            engine = Engine(
                host,
                structure,
                old.parent.device,
                write=True,
                pool=pool,
                data_write_guid=structure.header.data_write_guid,
            )
        try:
            if old is not None:
                _keep_content(engine, old, new, name, progress, cancel)
            note_child(parent, name)
            _set_locator(engine, locator_for(parent, name, linkage))
        finally:
            engine.close()


def _pieces_with_content(*images: VhdxImage) -> list[int]:
    """Ascending offsets of the pieces that are not a hole in at least one image."""
    found: set[int] = set()
    for each in images:
        for extent in each.extents(0, each.device.size):
            if extent.state != plane.HOLE:
                end = extent.offset + extent.length
                found.update(range(extent.offset // _PIECE * _PIECE, end, _PIECE))
    return sorted(found)


def _keep_content(
    engine: Engine,
    old: VhdxImage,
    new: VhdxImage,
    name: str,
    progress: Progress | None,
    cancel: Cancel | None,
) -> None:
    """Copies data that would read differently through ``new`` into the image."""
    size = engine.map.size
    for at in _pieces_with_content(old, new):
        if cancel is not None and cancel():
            raise VhdxError(
                "the rebase was stopped; the image has its old parent, and reads as before",
                reason=Reason.CANCELLED,
                path=name,
            )
        length = min(_PIECE, size - at)
        stored = [
            (e.offset, e.offset + e.length) for e in engine.map.extents(at, length) if e.depth == 0
        ]
        before = engine.map.read(length, at)
        present = max(0, min(length, new.device.size - at))
        after = (new.device.read(present, at) if present else b"") + bytes(length - present)
        if before != after:
            _copy_differences(engine, at, before, after, stored)
        if progress is not None:
            progress(at + length, size)
    engine.map.flush()


def _copy_differences(
    engine: Engine, at: int, before: bytes, after: bytes, stored: list[tuple[int, int]]
) -> None:
    step = engine.structure.parameters.logical_sector_size
    for offset in range(0, len(before), step):
        part = before[offset : offset + step]
        where = at + offset
        if part == after[offset : offset + step]:
            continue
        if any(start <= where < end for start, end in stored):
            continue
        engine.map.write(part, where)


@uninterruptible
def compact(
    path: StrPath,
    *,
    parent_search: Sequence[StrPath] = (),
    progress: Progress | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Compacted:
    """Compacts an image that is not in use; see :meth:`vhdx.Disk.compact`.

    Its content does not change, so images based on it stay valid.
    """
    host = open_file(path, write=True)
    try:
        guid = read_structure(host).header.data_write_guid
    except BaseException:
        host.close()
        raise
    disk = open_layer(host, search=[os.fsdecode(p) for p in parent_search], data_write_guid=guid)
    try:
        return disk.compact(progress, cancel, None)
    finally:
        disk.close()
