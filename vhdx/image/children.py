# SPDX-License-Identifier: MIT
"""Who is based on an image, so that nobody changes it under them.

A VHDX does not know its children. They are looked for in the image's own directory, and where a hint
says that there are some elsewhere: an extended attribute of the image's file, which others ignore. A
candidate counts when its parent locator accepts the image's DataWriteGuid, and its chain, resolved as
an open would, leads to this file. It also counts when no parent is found, because the image may have
been moved.

Hint (``user.vhdx.children``): ``vhdx children 1``, CRC-32C of the rest (8 hexadecimal digits), and
the absolute paths of children, each behind a NUL byte. It is replaced as a whole. Recovery: one that
does not fit its checksum counts as none; a path that leads to no child is ignored, and dropped when
the next child is added.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c

from vhdx import lazy
from vhdx.errors import InUseError, UnsupportedError, VhdxError
from vhdx.format.header import SIGNATURE
from vhdx.image.attributes import OWN_PREFIX
from vhdx.image.host import open_host
from vhdx.image.parents import candidates, existing
from vhdx.image.partial import is_partial
from vhdx.image.structure import Structure, read_structure
from vhdx.image.vhd_footer import find_footer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vhdx.image import vhd_opening

    StrPath = str | os.PathLike[str]
else:
    vhd_opening = lazy.Module("vhdx.image.vhd_opening")

__all__ = ["children_of", "guard_parent", "guard_replaced", "note_child", "pack_hint", "parse_hint"]

_log = logging.getLogger(__name__)
_HINT = OWN_PREFIX + "children"
_HEAD = b"vhdx children 1"
_LARGEST_HINT = 2048  # ext4 has 4 KiB at most for all attributes of a file
_MOST_NEIGHBOURS = 4096


def pack_hint(paths: list[str]) -> bytes:
    """The attribute's value; the oldest paths are left out where there are too many."""
    encoded = [b"\0" + os.fsencode(path) for path in paths]
    while sum(map(len, encoded)) > _LARGEST_HINT - len(_HEAD) - 9:
        del encoded[0]
    body = b"".join(encoded)
    return _HEAD + b" %08x" % google_crc32c.value(body) + body


def parse_hint(value: bytes) -> list[str]:
    """The paths in an attribute's value; none where it is not whole."""
    head, body = value[: len(_HEAD) + 9], value[len(_HEAD) + 9 :]
    if head != _HEAD + b" %08x" % google_crc32c.value(body):
        return []
    return [os.fsdecode(path) for path in body.split(b"\0")[1:] if path]


def _hinted(path: StrPath) -> list[str]:
    try:
        return parse_hint(os.getxattr(path, _HINT))
    except OSError:
        return []  # none, or a file system without them


def note_child(path: StrPath, child: StrPath, *, of: StrPath | None = None) -> None:
    """Leaves a hint at the image ``path`` that ``child`` is based on it, or is about to be.

    Args:
        path: of the image now.
        child: where the child is, or will be.
        of: where the image will be; ``path`` when None.
    """
    name = os.path.realpath(child)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # some file systems have no such locks
                fcntl.flock(fd, fcntl.LOCK_EX)
            kept = [each for each in _hinted(path) if each != name and os.path.lexists(each)]
            os.setxattr(fd, _HINT, pack_hint([*kept, name]))
        finally:
            os.close(fd)
    except OSError as error:
        there = os.path.realpath(path if of is None else of)
        if os.path.dirname(name) != os.path.dirname(there):
            _log.warning(
                "%s: no hint of %s can be left there (%s), so a change of it will not be refused",
                there,
                name,
                error.strerror,
            )


def children_of(path: StrPath, structure: Structure) -> Iterator[Path]:
    """Images that are based on the image ``path``, whose structure is ``structure``."""
    here = Path(os.path.realpath(path))
    try:
        beside = sorted(os.listdir(here.parent))[:_MOST_NEIGHBOURS]
    except OSError:
        beside = []
    places = [here.with_name(name) for name in beside if not is_partial(name)]
    seen = {os.fspath(here)}
    for place in [*places, *map(Path, _hinted(here))]:
        real = os.path.realpath(place)
        if real in seen or not _looks_like_vhdx(place):
            continue
        seen.add(real)
        if _is_based_on(place, here, structure):
            yield place


def _is_based_on(place: Path, here: Path, structure: Structure) -> bool:
    found = _structure_of(place)
    guid = structure.header.data_write_guid
    if found is None or found.parent is None or guid not in found.parent.linkages:
        return False
    for candidate in candidates(str(place), found.parent, ()):
        parent = existing(candidate)
        if parent is None or os.path.samefile(parent, place):
            continue
        if os.path.samefile(parent, here):
            return True
        other = _structure_of(parent)
        if other is not None and other.header.data_write_guid in found.parent.linkages:
            return False  # a copy of this image, elsewhere
    return True  # its parent is missing, and this image's GUID fits


def _structure_of(path: Path) -> Structure | None:
    try:
        host = open_host(path, write=False, locked=False)
    except VhdxError:
        return None
    try:
        return read_structure(host)
    except VhdxError:
        return None
    finally:
        host.close()


def _looks_like_vhdx(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(SIGNATURE)) == SIGNATURE
    except (OSError, ValueError):
        return False


def guard_parent(path: StrPath, structure: Structure) -> None:
    """Refuses to change an image that another one depends on.

    Raises:
        InUseError: naming the child.
    """
    child = next(children_of(path, structure), None)
    if child is not None:
        raise InUseError(
            f"{_shown(child, path)} depends on it as it is: a change would make that image unusable",
            path=path,
            hint="change the child instead, or merge it; force=True (--force of resize and snapshot) "
            "changes it all the same",
        )


def guard_replaced(path: StrPath) -> None:
    """Refuses to replace a file that another image depends on.

    Raises:
        InUseError: naming the child.
    """
    if not _looks_like_vhdx(Path(path)):
        _guard_replaced_vhd(path)
        return
    structure = _structure_of(Path(path))
    child = None if structure is None else next(children_of(path, structure), None)
    if child is not None:
        raise InUseError(
            f"{_shown(child, path)} depends on it as it is: without it that image is unusable",
            path=path,
            hint="merge or remove the child first, or choose another name",
        )


def _guard_replaced_vhd(path: StrPath) -> None:
    try:
        host = open_host(path, write=False, locked=False)
    except VhdxError:
        return
    try:
        with contextlib.suppress(UnsupportedError):
            footer = find_footer(host.leaf)
            if footer is not None:
                vhd_opening.guard_vhd_parent(host, footer)
    finally:
        host.close()


def _shown(child: Path, path: StrPath) -> str:
    beside = child.parent == Path(os.path.realpath(path)).parent
    return child.name if beside else os.fspath(child)
