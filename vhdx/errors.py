# SPDX-License-Identifier: MIT
"""Every failure that vhdx reports, each with a stable reason, the file and the offset.

Every class derives from :class:`VhdxError` and, where one matches, from a built-in exception, too.
"""

from __future__ import annotations

import errno
import os
from enum import StrEnum
from typing import ClassVar

__all__ = [
    "ClosedError",
    "DamagedError",
    "ExistsError",
    "HostIOError",
    "InUseError",
    "InvalidArgumentError",
    "MissingParentError",
    "NoSpaceError",
    "NotFoundError",
    "PoisonedError",
    "ProtocolError",
    "RangeError",
    "ReadOnlyError",
    "Reason",
    "UnsupportedError",
    "VhdxError",
]


class Reason(StrEnum):
    """Why something failed; stable across releases, for programs."""

    # requests
    RANGE = "range"
    READ_ONLY = "read_only"
    CLOSED = "closed"
    POISONED = "poisoned"
    FORKED = "forked"
    INVALID_ARGUMENT = "invalid_argument"
    NO_PROGRESS = "no_progress"
    INTERNAL = "internal"
    CANCELLED = "cancelled"
    NEEDS_CONSENT = "needs_consent"
    # the host
    NOT_FOUND = "not_found"
    EXISTS = "exists"
    NOT_A_FILE = "not_a_file"
    PERMISSION = "permission"
    IN_USE = "in_use"
    NO_SPACE = "no_space"
    NO_QUORUM = "no_quorum"
    IO = "io"
    NO_MEMORY = "no_memory"
    # formats
    UNKNOWN_FORMAT = "unknown_format"
    UNSUPPORTED = "unsupported"
    TRUNCATED = "truncated"
    HEADERS = "headers"
    HEADER_VERSION = "header_version"
    LOG_LOCATION = "log_location"
    LOG_VERSION = "log_version"
    LOG_EMPTY = "log_empty"
    LOG_TARGET = "log_target"
    REGION_TABLE = "region_table"
    REGION_OVERLAP = "region_overlap"
    REGION_MISSING = "region_missing"
    REGION_UNKNOWN_REQUIRED = "region_unknown_required"
    METADATA_TABLE = "metadata_table"
    METADATA_ITEM = "metadata_item"
    METADATA_MISSING = "metadata_missing"
    METADATA_UNKNOWN_REQUIRED = "metadata_unknown_required"
    INCOMPLETE = "incomplete"
    BAT_SIZE = "bat_size"
    BAT_STATE = "bat_state"
    BAT_RESERVED = "bat_reserved"
    BAT_OFFSET = "bat_offset"
    BAT_OVERLAP = "bat_overlap"
    BAT_SHIFTED = "bat_shifted"
    QOS_FILE = "qos_file"
    SECTOR_BITMAP = "sector_bitmap"
    PARENT_LOCATOR = "parent_locator"
    PARENT_MISSING = "parent_missing"
    PARENT_CHANGED = "parent_changed"
    PARENT_MISMATCH = "parent_mismatch"
    PARENT_CYCLE = "parent_cycle"
    PARENT_DEPTH = "parent_depth"
    PROTOCOL = "protocol"


class VhdxError(Exception):
    """Something failed.

    Attributes:
        reason: a stable :class:`Reason`.
        path: the file, or None.
        offset: bytes from the start of the file (or of the disk, for RANGE), or None.
        hint: what to do about it, or None.
    """

    default_reason: ClassVar[Reason] = Reason.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        reason: Reason | None = None,
        path: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = self.default_reason if reason is None else reason
        self.path = None if path is None else os.fspath(path)
        self.offset = offset
        self.hint = hint

    def __str__(self) -> str:
        where = "" if self.path is None else self.path
        if self.offset is not None:
            where = f"{where} at {self.offset:#x}".strip()
        text = f"{where}: {self.message}" if where else self.message
        return text if self.hint is None else f"{text}; {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        return (
            _rebuild,
            (type(self), self.message, self.reason, self.path, self.offset, self.hint),
        )


def _rebuild(
    kind: type[VhdxError],
    message: str,
    reason: Reason,
    path: str | None,
    offset: int | None,
    hint: str | None,
) -> VhdxError:
    return kind(message, reason=reason, path=path, offset=offset, hint=hint)


class _HostError(VhdxError, OSError):
    """A failure that also has an errno value."""

    error_number: ClassVar[int] = errno.EIO

    def __init__(
        self,
        message: str,
        *,
        reason: Reason | None = None,
        path: str | os.PathLike[str] | None = None,
        offset: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, reason=reason, path=path, offset=offset, hint=hint)
        self.errno = self.error_number
        self.strerror = message


class RangeError(VhdxError, ValueError):
    """A range that is not inside the disk; nothing was read or written."""

    default_reason = Reason.RANGE


class InvalidArgumentError(VhdxError, ValueError):
    """An argument out of its documented range."""

    default_reason = Reason.INVALID_ARGUMENT


class ClosedError(VhdxError, ValueError):
    """The disk was closed."""

    default_reason = Reason.CLOSED


class ReadOnlyError(_HostError, PermissionError):
    """A change was requested, but the image can only be read."""

    default_reason = Reason.READ_ONLY
    error_number = errno.EROFS


class NotFoundError(_HostError, FileNotFoundError):
    """There is no such file."""

    default_reason = Reason.NOT_FOUND
    error_number = errno.ENOENT


class ExistsError(_HostError, FileExistsError):
    """The destination exists already."""

    default_reason = Reason.EXISTS
    error_number = errno.EEXIST


class InUseError(_HostError, BlockingIOError):
    """The image is in use in a way that excludes this operation."""

    default_reason = Reason.IN_USE
    error_number = errno.EAGAIN


class NoSpaceError(_HostError):
    """The host is out of space; the image is usable again as soon as there is space."""

    default_reason = Reason.NO_SPACE
    error_number = errno.ENOSPC


class HostIOError(_HostError):
    """The operating system refused an access."""

    default_reason = Reason.IO


class PoisonedError(_HostError):
    """An earlier barrier or commit failed; only reopening the image shows what is durable."""

    default_reason = Reason.POISONED


class DamagedError(VhdxError, ValueError):
    """The image violates its specification so badly that it must be refused."""

    default_reason = Reason.TRUNCATED


class UnsupportedError(VhdxError, ValueError):
    """A format or feature that this version does not know."""

    default_reason = Reason.UNSUPPORTED


class MissingParentError(VhdxError, LookupError):
    """The parent of a differencing image is missing, or was replaced or changed."""

    default_reason = Reason.PARENT_MISSING


class ProtocolError(VhdxError):
    """The peer of a connection broke the NBD protocol."""

    default_reason = Reason.PROTOCOL
