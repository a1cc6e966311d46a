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

from vhdx import place, plane
from vhdx.errors import (
    ExistsError,
    HostIOError,
    InvalidArgumentError,
    ReadOnlyError,
    UnsupportedError,
    VhdxError,
)
from vhdx.format import metadata
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
        return Path(
            place.spelled(name) if place.of(name) is not place.of("") else os.path.abspath(name)
        )
    here = Path(path)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    base, suffix, number = f"{here.stem}-{stamp}", here.suffix or ".vhdx", 1
    found = here.with_name(base + suffix)
    while place.of(found).exists(os.fspath(found)):
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
        UnsupportedError: the image lies on a block device.
    """
    there, name = place.of(path), os.fspath(checkpoint)
    if there.kind(path) == "device":
        raise UnsupportedError(
            "a snapshot gives names to files, and a block device keeps its own",
            path=path,
            hint="create a differencing image in a file with vhdx create --parent",
        )
    if place.of(name) is not there:
        raise InvalidArgumentError("the checkpoint would be in another place", path=checkpoint)
    try:
        key = there.key(path)
    except OSError as error:
        raise HostIOError(f"it has lost its name: {error.strerror}", path=path) from error
    if base.host.key not in {key, (0, 0)}:
        raise HostIOError("another file has its name now", path=path)
    if there.is_same_name(path, name):
        raise InvalidArgumentError(
            "the checkpoint would have the disk's own name", path=checkpoint, hint="choose another"
        )
    if there.exists(name) and not _is_second_name(path, checkpoint):
        raise _exists(checkpoint)
    if checkpoint.suffix.lower() in {".raw", ".img"}:
        raise InvalidArgumentError(
            "an image with this name would be taken for a raw image",
            path=checkpoint,
            hint="name it .vhdx",
        )
    away = there.real(os.fspath(checkpoint.parent)) != os.path.dirname(path)
    if away and base.structure.parent is not None:
        raise InvalidArgumentError(
            "a checkpoint in another directory would not find its own parent",
            path=checkpoint,
            hint="keep it in the directory of the image",
        )
    there.check_replaceable(path)
    locator_for(checkpoint, path, base.header.data_write_guid)  # refuses an unusable name


def _is_second_name(path: str, checkpoint: Path) -> bool:
    """Whether the checkpoint is a hard link to the disk's file, left by a killed snapshot."""
    there, name = place.of(path), os.fspath(checkpoint)
    beside = os.path.join(there.real(os.fspath(checkpoint.parent)), checkpoint.name)
    return there.real(name) == beside and place.key_of(name) == there.key(path)


@contextlib.contextmanager
def second_name(path: str, checkpoint: Path) -> Iterator[None]:
    """Gives the file the second name ``checkpoint``; removes it again after an exception."""
    there, name = place.of(path), os.fspath(checkpoint)
    try:
        there.link(path, name)
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
        there.sync(os.fspath(checkpoint.parent))
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if there.key(path) == there.key(name):  # else it is the file's only name
                there.remove(name)
        raise


class FreshChild:
    """A child under a temporary name, ready to take the name of the image.

    Attributes:
        engine: its engine, whose lower device is the image's map.
    """

    def __init__(self, path: str, checkpoint: Path, base: Engine, pool: plane.Pool) -> None:
        self._target, self._place = path, place.of(path)
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
        self._draft = self._place.draft(path, sparse=base.host.sparse)
        host = self._draft.file
        try:
            self._draft.keep_attributes(path)
            layout.write_image(host.leaf, child, sparse=host.sparse, parent=link, items=items)
            self.engine = Engine(host, read_structure(host), base.map, write=True, pool=pool)
        except BaseException:
            host.close()
            self.discard()
            raise

    def take_name(self) -> None:
        """Renames the child to the image's name; :meth:`settle` makes the rename durable."""
        try:
            self._draft.take(self._target, replace=True)
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
            self._place.sync(os.path.dirname(self._target))
            base.freeze(os.fspath(checkpoint))
        except BaseException as error:
            self.engine.map.poison()
            failure = error
        switch.set(self.engine.map)
        return failure

    def discard(self) -> None:
        """Removes the file, unless it took the name."""
        self._draft.discard()


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
