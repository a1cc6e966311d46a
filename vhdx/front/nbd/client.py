# SPDX-License-Identifier: MIT
"""One client of an NBD server: its socket, its handshake, and its name."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vhdx.errors import ProtocolError
from vhdx.front.nbd.handshake import ExportTerms, Handshake, Negotiated
from vhdx.host.runtime import process_of

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable

    from vhdx import plane
    from vhdx.host import Export

__all__ = ["Client", "name_of", "negotiate", "terms_of"]

_SEND_BUFFER = 2 << 20
_KEEPALIVE_SECONDS = 60


class Client:
    """One accepted socket and its thread; its fields are written under the server's lock.

    Attributes:
        socket: the socket during the handshake, then None.
        connection: the connection in the transmission phase.
        thread: the thread that serves it.
        export: the name of its export.
    """

    def __init__(self, peer: socket.socket) -> None:
        self.socket: socket.socket | None = peer
        self.connection: plane.Connection | None = None
        self.thread: threading.Thread | None = None
        self.export = ""


def negotiate(
    peer: socket.socket, handshake: Handshake, seconds: float, is_closing: Callable[[], bool]
) -> Negotiated | None:
    """Drives ``handshake`` over a socket.

    Args:
        peer: the client's socket.
        handshake: the state machine, which does no I/O.
        seconds: the time limit for the whole handshake.
        is_closing: returns whether the server is closing and refuses new clients.

    Returns:
        The negotiated parameters, or None if the client ended the handshake.

    Raises:
        ProtocolError: the handshake took too long, or the client broke the protocol.
        OSError: the connection was lost.
    """
    if peer.family != socket.AF_UNIX:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Keepalive: a client whose host went down is dropped after about two minutes.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_SECONDS // 6)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    deadline = time.monotonic() + seconds
    answers: Iterable[bytes] = (handshake.greeting(),)
    while True:
        for answer in answers:
            peer.settimeout(_until(deadline))
            peer.sendall(answer)
        if handshake.negotiated is not None or handshake.finished:
            return handshake.negotiated
        peer.settimeout(_until(deadline))
        data = peer.recv(64 << 10)
        if not data:
            return None
        handshake.shutting_down = is_closing()
        answers = handshake.receive(data)


def _until(deadline: float) -> float:
    """Seconds until ``deadline`` (monotonic).

    Raises:
        ProtocolError: the deadline has passed.
    """
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise ProtocolError("the handshake took too long")
    return remaining


def terms_of(name: str, export: Export) -> ExportTerms:
    """The terms that the handshake offers for an export."""
    disk = export.disk
    description = f"{disk.format} {Path(disk.path).name}"
    return ExportTerms(name, description, export.device.size, disk.read_only)


def name_of(peer: socket.socket | None) -> str:
    """A name for the initiator: HOST:PORT, or COMMAND[PID] on a unix socket; "?" if unknown."""
    if peer is None:
        return "?"
    try:
        if peer.family != socket.AF_UNIX:
            host, port, *_ = peer.getpeername()
            return f"{host}:{port}"
        pid = process_of(peer).pid
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
    return f"{name}[{pid}]"
