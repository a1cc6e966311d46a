# SPDX-License-Identifier: MIT
"""New files that take their name when complete, with the attributes of the file they replace."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vhdx import place
from vhdx.errors import (
    ExistsError,
    HostIOError,
    InUseError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    VhdxError,
)
from vhdx.image.children import guard_replaced
from vhdx.image.erasing import abandon
from vhdx.image.names import host_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vhdx import plane

    StrPath = str | os.PathLike[str]

__all__ = ["new_file"]

_LOST = "the block device holds no image now"


@contextlib.contextmanager
def new_file(path: StrPath, *, force: bool, sparse: bool = True) -> Iterator[plane.Device]:
    """A leaf over a new file that gets the name ``path`` when the block ends without an exception.

    The content and the name are durable afterwards. After an exception nothing is left behind. With
    ``force`` an existing file is replaced; if ``path`` is a symbolic link, its target is replaced. A
    block device cannot be replaced: with ``force`` its content is written over. If that fails after
    the first write, it holds no image.

    Raises:
        ExistsError: ``path`` exists already and ``force`` is not set.
        InUseError: the existing file is open, or another image is based on it.
        NotFoundError, NoSpaceError, HostIOError: the file cannot be made.
    """
    there, name = place.of(path), place.spelled(path)
    with contextlib.ExitStack() as stack:
        try:
            _refuse_deleted(there, name)
            target = there.real(name) if force else name
            replaces = there.exists(target)
            if replaces:
                stack.enter_context(_guarded(there, target, force=force))
            draft = (
                there.overwrite(target, sparse=sparse)
                if replaces and there.kind(target) == "device"
                else there.draft(target, sparse=sparse, bulk=True)
            )
        except VhdxError:
            raise
        except FileNotFoundError as error:
            raise NotFoundError("there is no such directory", path=path) from error
        except ValueError as error:
            raise InvalidArgumentError("no file can have this name", path=path) from error
        except OSError as error:
            raise host_error(error, path) from error
        stack.callback(draft.file.close)
        stack.callback(draft.discard)
        leaf = draft.file.leaf
        leaf.path = os.fspath(path)
        if replaces:
            draft.keep_attributes(target)
        try:
            yield leaf
            leaf.flush()
        except BaseException as error:
            abandon(leaf)
            if isinstance(error, VhdxError) and leaf.is_erased:
                error.path = os.fspath(path)
                error.message = error.message.replace("nothing was left behind", _LOST)
                if _LOST not in error.message:
                    error.message += f"; {_LOST}"
            raise
        try:
            draft.take(target, replace=force)
            there.sync(os.fspath(Path(target).parent))
        except FileExistsError as error:
            raise _exists(path) from error
        except OSError as error:
            raise error if isinstance(error, VhdxError) else host_error(error, path) from error


def _refuse_deleted(there: place.Place, name: str) -> None:
    """Refuses a deleted file, which a path such as /proc/self/fd/N can still lead to."""
    try:
        links = there.links(name)
    except (OSError, ValueError):
        return  # no such file exists, or the name is impossible
    if links == 0:
        raise InvalidArgumentError(
            "the file was deleted, so there is no name that a new one could take", path=name
        )


@contextlib.contextmanager
def _guarded(there: place.Place, target: str, *, force: bool) -> Iterator[None]:
    """Locks the file to be replaced, so that no open image is lost."""
    if not force and there.kind(target) == "device":
        raise ExistsError(
            "it is a block device", path=target, hint="--force (force=True) writes over its content"
        )
    if not force:
        raise _exists(target)
    if place.key_of(target) is not None and there.kind(target) is None:
        raise HostIOError("it is not a regular file", reason=Reason.NOT_A_FILE, path=target)
    there.check_replaceable(target)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(there.guard(target))
        except InUseError:
            guard_replaced(target)  # if a child has it open, name the child
            raise
        guard_replaced(target)
        yield


def _exists(path: StrPath) -> ExistsError:
    return ExistsError("it exists already", path=path, hint="remove it, or use --force (force=True)")
