# SPDX-License-Identifier: MIT
"""How disks are served: the limits of clients, and the QoS settings of disks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vhdx import plane
from vhdx.qos import NORMALISED_UNIT, Scheduling, Settings

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["Limits", "ServerOptions"]


@dataclass(frozen=True)
class Limits:
    """The resources that clients may use; each value is a maximum.

    Attributes:
        connections: connections at a time, over all exports.
        handshake_seconds: time until the client has chosen an export.
        options: options in one handshake.
        option_bytes: bytes of data of one option.
        requests: requests in flight on one connection.
        connection_bytes: bytes of payload in flight on one connection.
        server_bytes: bytes of payload in flight on all connections. Each connection has 4 MiB of
            its own. The rest is shared, and is at least a quarter of this value.
        payload: bytes of one READ or WRITE.
    """

    connections: int = 100
    handshake_seconds: float = 10.0
    options: int = 32
    option_bytes: int = 64 << 10
    requests: int = 64
    connection_bytes: int = 64 << 20
    server_bytes: int = 512 << 20
    payload: int = 32 << 20

    @property
    def shared_bytes(self) -> int:
        """Bytes that connections may borrow in addition to their own 4 MiB each."""
        own = self.connections * plane.CONNECTION_BYTES
        return max(self.server_bytes - own, self.server_bytes // 4)


@dataclass(frozen=True)
class ServerOptions:
    """All options of a session except its disks and its address.

    Attributes:
        read_only: refuse changes.
        limits: the resources that clients may use.
        format: the format of images that are given as paths, as in :func:`vhdx.open`.
        qos: QoS settings by the name of the export, applied on top of those in ``qos_file``. In a
            mapping, None removes a setting. In a :class:`vhdx.qos.Settings`, only fields that
            differ from their default change a setting.
        qos_file: the file that QoS settings are read from and saved to; see
            :class:`vhdx.qos.Store`.
        qos_unit: bytes that count as one normalised I/O.
        qos_hook: a command that is run for each alert.
        scheduling: whether and how minimums are kept; with None they are only watched.
    """

    read_only: bool = False
    limits: Limits = field(default_factory=Limits)
    format: str | None = None
    qos: Mapping[str, Settings | Mapping[str, Any]] = field(default_factory=dict)
    qos_file: str | os.PathLike[str] | None = None
    qos_unit: int = NORMALISED_UNIT
    qos_hook: str | None = None
    scheduling: Scheduling | None = None
