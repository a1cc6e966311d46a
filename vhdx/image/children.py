# SPDX-License-Identifier: MIT
"""Finds the children of an image, so that a change of their parent can be refused.

An image does not record its children. They are searched for in the image's own directory and at the
paths in its hint. The hint is the note that the place keeps with the image's file: on the host an
extended attribute, which other programs ignore.
What makes a file a child depends on the format; ``children.py`` of each format decides it.

Hint (``user.vhdx.children``): ``vhdx children 1``, a space, the CRC-32C of the rest (8 hexadecimal
digits), and the absolute paths of children, each after a NUL byte. The hint is replaced as a whole.
Recovery: a hint with a wrong checksum counts as no hint. A path that leads to no child is ignored.
A path where no file exists is dropped when the next child is added.
"""

from __future__ import annotations

import importlib
import logging
import os
from pathlib import Path

import google_crc32c

from vhdx import place

__all__ = ["guard_replaced", "hinted", "note_child", "pack_hint", "parse_hint", "shown"]

StrPath = str | os.PathLike[str]

_log = logging.getLogger(__name__)
_HEAD = b"vhdx children 1"
_LARGEST_HINT = 2048  # ext4 has at most 4 KiB for all attributes of a file
_FORMATS = ("vhdx.image.vhdx.children", "vhdx.image.vhd.children")


def pack_hint(paths: list[str]) -> bytes:
    """The attribute's value; the oldest paths are dropped if there are too many."""
    encoded = [b"\0" + os.fsencode(path) for path in paths]
    while sum(map(len, encoded)) > _LARGEST_HINT - len(_HEAD) - 9:
        del encoded[0]
    body = b"".join(encoded)
    return _HEAD + b" %08x" % google_crc32c.value(body) + body


def parse_hint(value: bytes) -> list[str]:
    """The paths in an attribute's value; none if the value is invalid."""
    head, body = value[: len(_HEAD) + 9], value[len(_HEAD) + 9 :]
    if head != _HEAD + b" %08x" % google_crc32c.value(body):
        return []
    return [os.fsdecode(path) for path in body.split(b"\0")[1:] if path]


def hinted(path: StrPath) -> list[str]:
    """The paths in the hint of the image ``path``."""
    return parse_hint(place.of(path).note(place.spelled(path)))


def note_child(path: StrPath, child: StrPath, *, of: StrPath | None = None) -> None:
    """Adds ``child``, which is or will be based on the image ``path``, to the image's hint.

    Args:
        path: the image's path now.
        child: the child's path, now or later.
        of: the image's later path; ``path`` when None.
    """
    name = place.real(child)

    def with_child(note: bytes) -> bytes:
        kept = [each for each in parse_hint(note) if each != name and place.of(each).exists(each)]
        return pack_hint([*kept, name])

    try:
        place.of(path).change_note(place.spelled(path), with_child)
    except OSError as error:
        there = place.real(path if of is None else of)
        if os.path.dirname(name) != os.path.dirname(there):
            _log.warning(
                "%s: cannot record its child %s (%s), so changes to the parent will not be refused",
                there,
                name,
                error.strerror,
            )


def guard_replaced(path: StrPath) -> None:
    """Refuses to replace a file that another image depends on.

    Raises:
        InUseError: naming the child.
    """
    for each in _FORMATS:  # they belong to a higher layer, so they are imported by name
        importlib.import_module(each).guard_replaced(path)


def shown(child: Path, path: StrPath) -> str:
    """The path of ``child`` for messages: only its name if it is in the image's directory."""
    beside = child.parent == Path(place.real(path)).parent
    return child.name if beside else os.fspath(child)
