# SPDX-License-Identifier: MIT
"""What goes over a control socket: requests, replies and errors as data, and their JSON.

Requests are HTTP on a unix socket. Every path but ``/version``, ``/metrics`` and ``/events`` begins
with the version of this interface, as ``/v2/``; a server refuses any other version, and a client asks
nothing else of a server that speaks another one.

An operation is answered with one JSON object a line: any number of ``{"progress": [done, total]}``
and ``{"item": ...}``, then one ``{"result": ...}`` or ``{"error": ...}``. A request that fails before
its first line is answered with an HTTP status and ``{"error": ...}``.

The reports of QoS are those of :mod:`vhdx.qos.report`.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

from vhdx import errors
from vhdx.errors import InvalidArgumentError, ProtocolError, Reason, VhdxError
from vhdx.image.disk import ExtentState

__all__ = [
    "SUFFIX",
    "VERSION",
    "ChangeDisk",
    "ChangePolicy",
    "ConnectionReport",
    "DiskChanged",
    "Done",
    "ErrorReport",
    "ExportReport",
    "Info",
    "NoArguments",
    "OperationRequest",
    "PolicyChanged",
    "PolicyRemoved",
    "RemovePolicy",
    "ResizeArguments",
    "Resized",
    "ServerReport",
    "SnapshotArguments",
    "SnapshotTaken",
    "Subscribe",
    "VersionReport",
    "decode_reply",
    "decode_request",
    "encode",
]

VERSION = 2
"""Of this interface."""

SUFFIX = ".control"
"""Of the control sockets in the runtime directory."""

_Kind = TypeVar("_Kind")


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a client sends; a field that is not known is refused."""


class _Reply(msgspec.Struct, frozen=True):
    """What a server sends."""


class VersionReport(_Reply, frozen=True):
    """What a server is: its control interface, its package version, its process."""

    control: int
    vhdx: str
    pid: int


# ---- servers ----


class ExportReport(_Reply, frozen=True):
    """A disk that is served.

    Attributes:
        name, uri: of the export.
        path: absolute, of the image.
        key: (device, inode) of the file.
        format: vhdx, vhd or raw.
        virtual_size: bytes.
        read_only: whether clients can change it.
        connections: clients that are past the handshake.
    """

    name: str
    uri: str
    path: str
    key: tuple[int, int]
    format: str
    virtual_size: int
    read_only: bool
    connections: int


class ConnectionReport(_Reply, frozen=True):
    """What a client did so far; bytes are payload. See :class:`vhdx.plane.ConnectionCounters`."""

    export: str
    reads: int
    writes: int
    disconnects: int
    flushes: int
    trims: int
    caches: int
    write_zeroes: int
    block_statuses: int
    bytes_read: int
    bytes_written: int
    errors: int
    pooled: int
    under_way: int


class ServerReport(_Reply, frozen=True):
    """A server: its process, when it started (seconds since 1970), and what it serves."""

    pid: int
    started: float
    exports: list[ExportReport]
    connections: list[ConnectionReport]


# ---- operations on a disk ----


class NoArguments(_Request, frozen=True):
    """Of operations that take none."""


class ResizeArguments(_Request, frozen=True):
    """See :meth:`vhdx.Disk.resize`; ``size`` in bytes."""

    size: int
    shrink: bool = False
    unsafe: bool = False


class SnapshotArguments(_Request, frozen=True):
    """See :meth:`vhdx.Disk.snapshot`; ``checkpoint`` is an absolute path."""

    checkpoint: str | None = None


class OperationRequest(_Request, frozen=True):
    """An operation on an export; its arguments are checked by the operation."""

    export: str
    arguments: dict[str, Any] = {}


class Done(_Reply, frozen=True):
    """An operation that has nothing to tell but that it is done."""


class Info(_Reply, frozen=True):
    """What ``vhdx info --json`` shows of the image, and of each layer."""

    facts: dict[str, Any]
    chain: list[dict[str, Any]]


class Resized(_Reply, frozen=True):
    """What is left to be done in the guest, or None."""

    note: str | None


class SnapshotTaken(_Reply, frozen=True):
    """The path of the checkpoint."""

    checkpoint: str


ExtentItems = list[tuple[int, int, ExtentState, int | None]]
"""Of :class:`vhdx.image.disk.Extent`: offset, length, state, depth."""


# ---- QoS ----


class Subscribe(_Request, frozen=True):
    """Has figures sampled for so many seconds, up to a day."""

    seconds: float


class ChangeDisk(_Request, frozen=True, tag_field="change", tag="disk"):
    """Changes what is wanted of a disk; see :meth:`vhdx.qos.Domain.set_disk`."""

    name: str
    settings: dict[str, int | None] = {}
    policy: str | None = None


class ChangePolicy(_Request, frozen=True, tag_field="change", tag="policy"):
    """Makes a policy or changes one.

    Attributes:
        name: of the policy, or the id of one that there is.
        settings: those that change; null takes one away.
        kind: dedicated or aggregated, of a new one.
        policy_id: of a new one, to bring one back that disks name.
    """

    name: str
    settings: dict[str, int | None] = {}
    kind: str | None = None
    policy_id: str | None = None


class RemovePolicy(_Request, frozen=True, tag_field="change", tag="remove_policy"):
    """Removes the policy of that name or id."""

    name: str


class DiskChanged(_Reply, frozen=True):
    """A warning where the minimums cannot all be kept, or None."""

    warning: str | None


class PolicyChanged(_Reply, frozen=True):
    """The id of the policy, and a warning as for a disk."""

    policy_id: str
    warning: str | None


class PolicyRemoved(_Reply, frozen=True):
    """The names of the disks that had the policy."""

    disks: list[str]


# ---- errors ----


class ErrorReport(_Reply, frozen=True):
    """An exception of a server."""

    type: str
    message: str
    reason: str | None = None
    path: str | None = None
    offset: int | None = None
    hint: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> ErrorReport:
        """What goes over the socket for ``error``."""
        if not isinstance(error, VhdxError):
            return cls("VhdxError", f"the server failed: {error!r}")
        reason, path = error.reason.value, error.path
        return cls(type(error).__name__, error.message, reason, path, error.offset, error.hint)

    def exception(self) -> VhdxError:
        """The exception again; an unknown type is a plain VhdxError."""
        kind = getattr(errors, self.type, VhdxError)
        if not (isinstance(kind, type) and issubclass(kind, VhdxError)):
            kind = VhdxError
        try:
            reason = None if self.reason is None else Reason(self.reason)
        except ValueError:
            reason = None
        return kind(self.message, reason=reason, path=self.path, offset=self.offset, hint=self.hint)


# ---- JSON ----


def encode(value: Any) -> bytes:
    """The JSON of any of these, in one line.

    The standard library writes it, because a path may hold bytes that are no UTF-8.
    """
    plain = msgspec.to_builtins(value, enc_hook=str)
    return json.dumps(plain).encode()


def decode_request(data: bytes, kind: Any) -> Any:
    """The request of that type (or union of types) which ``data`` is.

    Raises:
        InvalidArgumentError: it is none.
    """
    try:
        return convert_request(json.loads(data), kind)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"the request is no JSON that can be read: {error!r}") from error


def convert_request(value: Any, kind: Any) -> Any:
    """Like :func:`decode_request`, for JSON that is decoded already."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidArgumentError(f"the request cannot be understood: {error}") from error


def decode_reply(value: Any, kind: type[_Kind]) -> _Kind:
    """The reply of that type which the decoded JSON ``value`` is.

    Raises:
        ProtocolError: it is none.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the answer of the server cannot be understood: {error}") from error
