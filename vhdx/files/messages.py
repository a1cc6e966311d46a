# SPDX-License-Identifier: MIT
"""What a command asks the reader of files, and what it answers, as JSON."""

from __future__ import annotations

import msgspec

__all__ = ["Copied", "FileEntry", "Wanted"]


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with a file of an image.

    Attributes:
        action: "list", "read" or "copy".
        image: its path.
        format, parent_search: as for :func:`vhdx.open`.
        partition: number of the partition, or the name of a logical volume; "0" is the whole disk,
            and None the only one with a file system.
        path: of the file or directory, from the root of the file system.
        destination: of a copy.
        recursive: copy directories.
        force: replace the destination of a copy.
    """

    action: str
    image: str
    format: str | None = None
    parent_search: list[str] = []
    partition: str | None = None
    path: str = "/"
    destination: str = ""
    recursive: bool = False
    force: bool = False


class FileEntry(msgspec.Struct, frozen=True):
    """A file in a file system of an image.

    Attributes:
        name: as the file system has it; bytes that are not UTF-8 are surrogates (PEP 383).
        kind: "file", "directory", "link" or "other".
        size: bytes.
        mode: permission bits.
        modified: seconds since 1970.
        target: of a symbolic link.
    """

    name: str
    kind: str
    size: int
    mode: int
    modified: float
    target: str | None = None


class Copied(msgspec.Struct, frozen=True):
    """How far a copy is: bytes done and in all, files done, and what could not be copied."""

    done: int
    total: int
    files: int
    failures: list[str]
