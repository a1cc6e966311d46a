# SPDX-License-Identifier: MIT
"""The requests, replies and errors of the control socket, as data and as JSON.

Requests are HTTP on a unix socket. ``/v1/server``, which lists what is served, and ``/v1/stop`` are
the same in every version of this interface, so servers are always found and stopped. ``/metrics``
and ``/events`` have no version. Every other path begins with the present version, such as ``/v2/``.
A server refuses other versions, and a client asks them of no server that speaks another one.

The reply to an operation has one JSON object a line: any number of ``{"progress": [done, total]}``
and ``{"item": ...}``, then one ``{"result": ...}`` or ``{"error": ...}``. The reply to a request
that fails before its first line is an HTTP error status with ``{"error": ...}``.

QoS reports are defined in :mod:`vhdx.qos.report`.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

from vhdx import errors
from vhdx.errors import InvalidArgumentError, ProtocolError, Reason, VhdxError
from vhdx.image.disk import ExtentState

__all__ = [
    "VERSION",
    "ChangeDisk",
    "ChangePolicy",
    "ConnectionReport",
    "DiskChanged",
    "Done",
    "ErrorReport",
    "ExportReport",
    "ExtentItems",
    "Info",
    "NoArguments",
    "OperationRequest",
    "PolicyChanged",
    "PolicyRemoved",
    "RemovePolicy",
    "Request",
    "ResizeArguments",
    "Resized",
    "ServerReport",
    "SnapshotArguments",
    "SnapshotTaken",
    "Subscribe",
    "convert_request",
    "decode_reply",
    "decode_request",
    "encode",
]

VERSION = 2
"""The version of this interface."""

_Kind = TypeVar("_Kind")


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A request from a client; unknown fields are refused."""


class _Reply(msgspec.Struct, frozen=True):
    """A reply from a server; unknown fields are ignored."""


# ---- servers ----


class ExportReport(_Reply, frozen=True):
    """A disk that is served.

    Attributes:
        name, uri: name and URI of the export.
        path: the absolute path of the image.
        key: (device, inode) of the file.
        format: vhdx, vhd or raw.
        virtual_size: bytes.
        read_only: whether it refuses changes by clients.
        connections: the number of clients past the handshake.
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
    """The counters of a connection (payload bytes): :class:`vhdx.plane.ConnectionCounters`."""

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
    failed_writes: int = 0


class ServerReport(_Reply, frozen=True):
    """A server and what it serves. Later versions may add fields, and take none away.

    Attributes:
        pid: its process.
        started: seconds since 1970.
        exports, connections: what it serves, and to whom.
        control: the version of this interface that it speaks; the first one did not say.
        vhdx: the version of its package.
    """

    pid: int
    started: float
    exports: list[ExportReport]
    connections: list[ConnectionReport]
    control: int = 1
    vhdx: str = "an older one"


# ---- operations on a disk ----


class NoArguments(Request, frozen=True):
    """The arguments of operations that take none."""


class ResizeArguments(Request, frozen=True):
    """See :meth:`vhdx.Disk.resize`; ``size`` in bytes."""

    size: int
    shrink: bool = False
    unsafe: bool = False


class SnapshotArguments(Request, frozen=True):
    """See :meth:`vhdx.Disk.snapshot`; ``checkpoint`` is an absolute path."""

    checkpoint: str | None = None


class OperationRequest(Request, frozen=True):
    """An operation on an export; its arguments are checked by the operation."""

    export: str
    arguments: dict[str, Any] = {}


class Done(_Reply, frozen=True):
    """The result of an operation that returns nothing."""


class Info(_Reply, frozen=True):
    """What ``vhdx info --json`` prints for the image, and for each layer."""

    facts: dict[str, Any]
    chain: list[dict[str, Any]]


class Resized(_Reply, frozen=True):
    """A note about what is left to do in the guest, or None."""

    note: str | None


class SnapshotTaken(_Reply, frozen=True):
    """The path of the checkpoint."""

    checkpoint: str


ExtentItems = list[tuple[int, int, ExtentState, int | None]]
"""Fields of :class:`vhdx.image.disk.Extent`: offset, length, state, depth."""


# ---- QoS ----


class Subscribe(Request, frozen=True):
    """Keeps sampling on for this many seconds, at most a day."""

    seconds: float


class ChangeDisk(Request, frozen=True, tag_field="change", tag="disk"):
    """Changes the QoS settings of a disk; see :meth:`vhdx.qos.Domain.set_disk`."""

    name: str
    settings: dict[str, int | None] = {}
    policy: str | None = None


class ChangePolicy(Request, frozen=True, tag_field="change", tag="policy"):
    """Creates a policy or changes one.

    Attributes:
        name: the name of the policy, or the id of an existing one.
        settings: the settings to change; null removes a setting.
        kind: dedicated or aggregated, for a new policy; null means dedicated.
        policy_id: the id of a new policy, to restore a deleted policy that disks still refer to.
    """

    name: str
    settings: dict[str, int | None] = {}
    kind: str | None = None
    policy_id: str | None = None


class RemovePolicy(Request, frozen=True, tag_field="change", tag="remove_policy"):
    """Removes the policy of that name or id."""

    name: str


class DiskChanged(_Reply, frozen=True):
    """A warning if not all minimums can be kept, or None."""

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
        """The report that is sent for ``error``."""
        if not isinstance(error, VhdxError):
            return cls("VhdxError", f"the server failed: {error!r}")
        reason, path = error.reason.value, error.path
        return cls(type(error).__name__, error.message, reason, path, error.offset, error.hint)

    def exception(self) -> VhdxError:
        """Rebuilds the exception; an unknown type becomes a plain VhdxError."""
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
    """The JSON of any of these objects, on one line.

    The standard library encodes it, because a path may contain bytes that are not valid UTF-8.
    """
    plain = msgspec.to_builtins(value, enc_hook=str)
    return json.dumps(plain).encode()


def decode_request(data: bytes, kind: Any) -> Any:
    """Decodes ``data`` as a request of type (or union of types) ``kind``.

    Raises:
        InvalidArgumentError: ``data`` is not such a request.
    """
    try:
        return convert_request(json.loads(data), kind)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(f"the request is not valid JSON: {error!r}") from error


def convert_request(value: Any, kind: Any) -> Any:
    """Like :func:`decode_request`, for decoded JSON."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidArgumentError(f"the request cannot be understood: {error}") from error


def decode_reply(value: Any, kind: type[_Kind]) -> _Kind:
    """Converts the decoded JSON ``value`` to a reply of type ``kind``.

    Raises:
        ProtocolError: ``value`` is not such a reply.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the answer of the server cannot be understood: {error}") from error
