# SPDX-License-Identifier: MIT
"""Snapshots of an open image: its file becomes the parent of a new child that takes its name.

A child that names the checkpoint as its parent is written under a temporary name. Then requests are
paused for a moment, and everything is committed. The file gets a second name, that of the
checkpoint, and one rename gives the child the image's name. A crash before the rename leaves the
image as it was, perhaps with a second name. A crash after the rename leaves the child over the
checkpoint. No data is copied.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vhdx import plane
from vhdx.errors import (
    ExistsError,
    HostIOError,
    InvalidArgumentError,
    ReadOnlyError,
    VhdxError,
)
from vhdx.format import metadata
from vhdx.image.attributes import check_owner, copy_attributes
from vhdx.image.host import HostFile
from vhdx.image.partial import create_partial
from vhdx.image.replacing import sync_directory
from vhdx.image.vhdx import layout
from vhdx.image.vhdx.differencing import DEFAULT_CHILD_BLOCK_SIZE, inherited_items, locator_for
from vhdx.image.vhdx.engine import Engine
from vhdx.image.vhdx.structure import read_structure

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_place", "checkpoint_path", "fresh_child", "second_name"]


def checkpoint_path(path: str, wanted: str | os.PathLike[str] | None) -> Path:
    """The absolute path of a checkpoint of ``path``.

    If ``wanted`` is None, it is a free name beside the image: the image's stem, the time in UTC,
    and a number if that name is taken.
    """
    if wanted is not None:
        name = os.fsdecode(wanted)
        if "\0" in name:
            raise InvalidArgumentError("no file can have this name", path=path)
        return Path(os.path.abspath(name))
    here = Path(path)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    base, suffix, number = f"{here.stem}-{stamp}", here.suffix or ".vhdx", 1
    found = here.with_name(base + suffix)
    while os.path.lexists(found):
        number += 1
        found = here.with_name(f"{base}-{number}{suffix}")
    return found


def _exists(checkpoint: Path) -> ExistsError:
    return ExistsError("it exists already", path=checkpoint, hint="choose another name")


def check_place(path: str, checkpoint: Path, base: Engine) -> None:
    """Refuses a checkpoint path that would leave an image that does not open.

    Raises:
        HostIOError: ``path`` no longer leads to the open file, or its owner cannot be kept.
        ExistsError: another file has the checkpoint's name.
        InvalidArgumentError: the name cannot be used, or the checkpoint would not find its parent.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise HostIOError(f"it has lost its name: {error.strerror}", path=path) from error
    if base.host.key not in {(status.st_dev, status.st_ino), (0, 0)}:
        raise HostIOError("another file has its name now", path=path)
    if _is_same_name(path, checkpoint):
        raise InvalidArgumentError(
            "the checkpoint would have the disk's own name", path=checkpoint, hint="choose another"
        )
    if os.path.lexists(checkpoint) and not _is_second_name(path, checkpoint):
        raise _exists(checkpoint)
    if checkpoint.suffix.lower() in {".raw", ".img"}:
        raise InvalidArgumentError(
            "an image with this name would be taken for a raw image",
            path=checkpoint,
            hint="name it .vhdx",
        )
    away = os.path.realpath(checkpoint.parent) != os.path.dirname(path)
    if away and base.structure.parent is not None:
        raise InvalidArgumentError(
            "a checkpoint in another directory would not find its own parent",
            path=checkpoint,
            hint="keep it in the directory of the image",
        )
    check_owner(path)
    locator_for(checkpoint, path, base.header.data_write_guid)  # refuses an unusable name


def _is_same_name(path: str, checkpoint: Path) -> bool:
    """Whether both paths lead to the same directory entry."""
    if os.path.realpath(path) == os.path.realpath(checkpoint):
        return True
    try:
        if not os.path.samefile(path, checkpoint):
            return False
        if os.stat(path).st_nlink == 1:
            # The file has one name, so both paths lead to it: through a bind mount, or in a
            # case-insensitive directory.
            return True
        beside = os.path.samefile(os.path.dirname(path), checkpoint.parent)
    except OSError:
        return False
    return beside and os.path.basename(path).casefold() == checkpoint.name.casefold()


def _is_second_name(path: str, checkpoint: Path) -> bool:
    """Whether the checkpoint is a hard link to the disk's file, left by a killed snapshot."""
    return not checkpoint.is_symlink() and os.path.samefile(path, checkpoint)


@contextlib.contextmanager
def second_name(path: str, checkpoint: Path) -> Iterator[None]:
    """Gives the file the second name ``checkpoint``; removes it again after an exception."""
    try:
        os.link(path, checkpoint)
    except FileExistsError as error:
        if not _is_second_name(path, checkpoint):
            raise _exists(checkpoint) from error
    except OSError as error:
        raise HostIOError(
            f"the checkpoint cannot be named: {error.strerror}", path=checkpoint
        ) from error
    except ValueError as error:
        raise InvalidArgumentError("no file can have this name", path=checkpoint) from error
    try:
        sync_directory(checkpoint.parent)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if os.path.samefile(path, checkpoint):  # else it is the file's only name
                checkpoint.unlink()
        raise


class FreshChild:
    """A child under a temporary name, ready to take the name of the image.

    Attributes:
        engine: its engine, whose lower device is the image's map.
    """

    def __init__(self, path: str, checkpoint: Path, base: Engine, pool: plane.Pool) -> None:
        self._target = Path(path)
        parameters = base.structure.parameters
        child = metadata.DiskParameters(
            virtual_size=parameters.virtual_size,
            block_size=DEFAULT_CHILD_BLOCK_SIZE,
            logical_sector_size=parameters.logical_sector_size,
            physical_sector_size=parameters.physical_sector_size,
            disk_id=parameters.disk_id,
            leave_blocks_allocated=False,
            has_parent=True,
        )
        link = locator_for(checkpoint, self._target, base.header.data_write_guid)
        items = inherited_items(base.structure)
        self._temporary, fd = create_partial(self._target)
        sparse = base.host.sparse
        try:
            leaf = plane.File(fd, 0, read_only=False, sparse=sparse, path=path)
        except BaseException:  # fd is closed
            self.discard()
            raise
        try:
            copy_attributes(self._target, fd)
            layout.write_image(leaf, child, sparse=sparse, parent=link, items=items)
            status = os.fstat(fd)
            host = HostFile(
                path, leaf, read_only=False, sparse=sparse, key=(status.st_dev, status.st_ino), fd=fd
            )
            self.engine = Engine(host, read_structure(host), base.map, write=True, pool=pool)
        except BaseException:
            leaf.close()
            self.discard()
            raise

    def take_name(self) -> None:
        """Renames the child to the image's name; :meth:`settle` makes the rename durable."""
        try:
            self._temporary.replace(self._target)
        except OSError as error:
            raise HostIOError(
                f"the child cannot take the name: {error.strerror}", path=self._target
            ) from error

    def settle(self, switch: plane.Switch, base: Engine, checkpoint: Path) -> BaseException | None:
        """Sends requests to the child, and freezes the base; a failure poisons the child.

        No data in the child may count as durable before the child's name is durable.
        """
        failure: BaseException | None = None
        try:
            sync_directory(self._target.parent)
            base.freeze(os.fspath(checkpoint))
        except BaseException as error:
            self.engine.map.poison()
            failure = error
        switch.set(self.engine.map)
        return failure

    def discard(self) -> None:
        """Removes the file, unless it took the name."""
        with contextlib.suppress(OSError):
            self._temporary.unlink()


@contextlib.contextmanager
def fresh_child(path: str, checkpoint: Path, base: Engine, pool: plane.Pool) -> Iterator[FreshChild]:
    """Makes a child of ``base``, and removes it if the block ends with an exception."""
    if base.host.read_only:
        raise ReadOnlyError("it is open for reading only", path=path)
    try:
        child = FreshChild(path, checkpoint, base, pool)
    except VhdxError:
        raise
    except OSError as error:
        raise HostIOError(f"the child cannot be made: {error.strerror}", path=path) from error
    try:
        yield child
    except BaseException:
        try:
            with contextlib.suppress(VhdxError):  # the first error is the one to report
                child.engine.close()
        finally:
            child.discard()
        raise
