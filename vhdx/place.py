# SPDX-License-Identifier: MIT
"""Places: where the files of images live, and what images need of them.

The host's file systems are one place, and paths without a scheme are theirs. Another place has a
scheme: ``space:/pool/volume/disk.vhdx`` (users may write ``space://pool/...``; :func:`spelled`).
Paths are strings with ``/`` between directories, so ``pathlib`` can take them apart, and only the
place touches what they name. Whoever provides a place registers it here; images know only these
protocols.

Methods that change or look up names raise the :class:`OSError` that the host's calls raise
(:class:`FileExistsError`, :class:`FileNotFoundError` ...). Methods that open files raise
:class:`vhdx.errors.VhdxError`.
"""

from __future__ import annotations

import importlib
import os
import re
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from vhdx import plane

__all__ = [
    "Draft",
    "ImageFile",
    "Key",
    "Place",
    "is_host",
    "key_of",
    "of",
    "open_file",
    "real",
    "register",
    "spelled",
]

Key = tuple[int, int]
"""Tells files apart: equal for two paths that lead to one file."""


class ImageFile(Protocol):
    """An open file that holds an image, or a part of one."""

    path: str
    """As the caller gave it."""
    leaf: plane.Device
    """Reads and writes the file."""
    read_only: bool
    sparse: bool
    """Whether released space is given back to the place."""

    @property
    def key(self) -> Key:
        """Equal for every open of one file."""

    def set_aside(self, offset: int, length: int) -> None:
        """Makes the range read zeros, durably; a write there then needs no metadata of the place."""

    def allocated(self) -> int:
        """Bytes of space that the file takes."""

    def freeze(self, path: str) -> None:
        """Makes the file, now named ``path``, read-only, also for others that open it."""

    def close(self) -> None:
        """Closes the file and gives up its lock; the leaf must not be used afterwards."""


class Draft(Protocol):
    """A new file that has no name of its own yet; it is locked for writing.

    A draft that a process leaves behind is removed when the next one is made for the same path.
    """

    @property
    def file(self) -> ImageFile:
        """The file."""

    def keep_attributes(self, source: str) -> None:
        """Takes over owner, mode and attributes of another file."""

    def take(self, path: str, *, replace: bool) -> None:
        """Names the file, at one moment; durable after :meth:`Place.sync`."""

    def discard(self) -> None:
        """Removes the file unless it was named; it stays open."""


class Place(Protocol):
    """A tree of names."""

    def open(self, path: str, *, write: bool, sparse: bool = True, locked: bool = True) -> ImageFile:
        """Opens a file, and locks it unless ``locked`` is False.

        Raises:
            NotFoundError, ReadOnlyError, HostIOError: it cannot be opened like that.
            InUseError: it is open elsewhere in a way that excludes this.
        """

    def draft(self, path: str, *, sparse: bool = True, bulk: bool = False) -> Draft:
        """A new, empty file that will be named ``path`` or replace it."""

    def overwrite(self, path: str, *, sparse: bool = True) -> Draft:
        """A draft over a block device: its leaf has the device's size and holds any data."""

    def guard(self, path: str) -> AbstractContextManager[None]:
        """Keeps writers out of an existing file that is about to be replaced."""

    def real(self, path: str) -> str:
        """The absolute path, with links resolved."""

    def key(self, path: str) -> Key:
        """Of the file that the path leads to."""

    def exists(self, path: str) -> bool:
        """Whether the name is taken, also by a link that leads nowhere."""

    def kind(self, path: str) -> str | None:
        """What the path leads to: "file", "device", or None for nothing that can hold an image.

        A block device keeps its name and size, and cannot be replaced.
        """

    def is_same_name(self, path: str, other: str) -> bool:
        """Whether both are one name, and not two names of one file."""

    def peek(self, path: str, length: int) -> bytes:
        """The first bytes of a file, fewer if it is shorter; no lock is taken."""

    def links(self, path: str) -> int:
        """How many names the file has."""

    def names(self, directory: str) -> list[str]:
        """The names in a directory."""

    def link(self, path: str, other: str) -> None:
        """Gives a file a second name."""

    def rename(self, path: str, other: str) -> None:
        """Renames a file, and replaces ``other``."""

    def remove(self, path: str) -> None:
        """Removes a name."""

    def sync(self, directory: str) -> None:
        """Makes the names in a directory durable."""

    def check_replaceable(self, path: str) -> None:
        """Raises HostIOError if a draft could not take over the file's owner."""

    def keep_attributes(self, source: str, path: str) -> None:
        """Gives ``path`` owner, mode and attributes of ``source``, durably."""

    def note(self, path: str) -> bytes:
        """A note that the place keeps with the file; empty if there is none."""

    def change_note(self, path: str, change: Callable[[bytes], bytes]) -> None:
        """Replaces the note of a file by what ``change`` makes of it; one change at a time."""


_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/+")
_places: dict[str, Place] = {}
# That register the places of schemes; imported when a path of theirs is used first.
_modules = {"": "vhdx.image.host", "space": "vhdx.volume.place"}


def register(scheme: str, place: Place) -> None:
    """Makes ``place`` the place of paths with this scheme; "" is the host."""
    _places[scheme] = place


def _is_known(scheme: str) -> bool:
    return scheme in _places or scheme in _modules


def spelled(path: str | os.PathLike[str]) -> str:
    """The path as places and ``pathlib`` know it: one slash after a scheme that is registered."""
    text = os.fsdecode(path)
    match = _SCHEME.match(text)
    if match is None or not _is_known(match[1]):
        return text
    return f"{match[1]}:/{text[match.end() :]}"


def of(path: str | os.PathLike[str]) -> Place:
    """The place that a path belongs to."""
    match = _SCHEME.match(os.fsdecode(path))
    scheme = match[1] if match is not None and _is_known(match[1]) else ""
    if scheme not in _places:
        importlib.import_module(_modules[scheme])
    return _places[scheme]


def is_host(path: str | os.PathLike[str]) -> bool:
    """Whether the path is one of the host's file systems."""
    match = _SCHEME.match(os.fsdecode(path))
    return match is None or not _is_known(match[1])


def open_file(
    path: str | os.PathLike[str], *, write: bool, sparse: bool = True, locked: bool = True
) -> ImageFile:
    """Opens the file of an image in its place; see :meth:`Place.open`."""
    return of(path).open(spelled(path), write=write, sparse=sparse, locked=locked)


def real(path: str | os.PathLike[str]) -> str:
    """The absolute path, with links resolved."""
    return of(path).real(spelled(path))


def key_of(path: str | os.PathLike[str]) -> Key | None:
    """The key of the file that the path leads to; None if there is none."""
    try:
        return of(path).key(spelled(path))
    except (OSError, ValueError):
        return None
