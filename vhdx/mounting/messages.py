# SPDX-License-Identifier: MIT
"""What a command and the private server of an image tell each other, as JSON."""

from __future__ import annotations

import msgspec

from vhdx.control import api

__all__ = ["Result", "Started", "Wanted"]


class Wanted(msgspec.Struct, frozen=True):
    """What to serve.

    Attributes:
        path, format, parent_search: as for :func:`vhdx.open`.
        read_only: refuse changes.
        name: of the export.
        socket: the path of the unix socket.
        result: the path of the file for the :class:`Result`.
    """

    path: str
    format: str | None
    parent_search: list[str]
    read_only: bool
    name: str
    socket: str
    result: str


class Started(msgspec.Struct, frozen=True):
    """The line that a server writes at its start; sizes in bytes."""

    size: int = 0
    sector_size: int = 0
    error: api.ErrorReport | None = None


class Result(msgspec.Struct, frozen=True):
    """What became of the image.

    Attributes:
        failed_writes: writes, zeroes and flushes of the kernel that failed.
        error: why the image could not be flushed and closed; None if it was.
    """

    failed_writes: int
    error: str | None
