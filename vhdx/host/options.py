# SPDX-License-Identifier: MIT
"""How disks are served: what clients may use, and what is wanted of each disk."""

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
    """What clients may use.

    Attributes:
        connections: at once, over all exports.
        handshake_seconds: until an export is chosen.
        options: of a handshake.
        option_bytes: data of one option.
        requests: under way in one connection.
        connection_bytes: payload under way in one connection.
        server_bytes: payload under way in all connections. Each connection has 4 MiB of its own. The
            rest is shared, but never less than a quarter of this value.
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
        """Bytes that connections may borrow, beyond what each has of its own."""
        own = self.connections * plane.CONNECTION_BYTES
        return max(self.server_bytes - own, self.server_bytes // 4)


@dataclass(frozen=True)
class ServerOptions:
    """Everything about a session but its disks and where clients reach it.

    Attributes:
        read_only: refuse changes.
        limits: what clients may use.
        format: of the paths, as in :func:`vhdx.open`.
        qos: what is wanted of each disk, by the name of its export: changes of what the file says,
            in which None takes a setting away, or settings, which change what they have.
        qos_file: where that is kept, and taken from; see :class:`vhdx.qos.Store`.
        qos_unit: bytes that count as one normalised I/O.
        qos_hook: a command that is run for each alert.
        scheduling: whether minimums are kept, and how; watched only when None.
    """

    read_only: bool = False
    limits: Limits = field(default_factory=Limits)
    format: str | None = None
    qos: Mapping[str, Settings | Mapping[str, Any]] = field(default_factory=dict)
    qos_file: str | os.PathLike[str] | None = None
    qos_unit: int = NORMALISED_UNIT
    qos_hook: str | None = None
    scheduling: Scheduling | None = None
