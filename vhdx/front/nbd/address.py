# SPDX-License-Identifier: MIT
"""Where a server listens, written as an NBD URI (NetworkBlockDevice doc/uri.md)."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

from vhdx.errors import HostIOError, InUseError, InvalidArgumentError
from vhdx.host.runtime import (
    BACKLOG,
    LONGEST_SOCKET_PATH,
    is_alive,
    listen_unix,
    runtime_directory,
)

__all__ = [
    "Address",
    "Listener",
    "address_of",
    "bind",
    "inherited_socket",
    "parse_address",
    "private_address",
    "uri_of",
]

_PORT = 10809
_FIRST_INHERITED = 3  # SD_LISTEN_FDS_START


@dataclass(frozen=True)
class Address:
    """A unix socket (``path``), or a TCP host and port; port 0 lets the kernel choose."""

    path: str | None = None
    host: str | None = None
    port: int = _PORT


def parse_address(uri: str) -> Address:
    """Parses the address ``nbd+unix:///?socket=PATH`` or ``nbd://HOST[:PORT]``.

    Raises:
        InvalidArgumentError: another scheme, an export name, or unknown parameters.
    """

    def refuse(why: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"cannot listen on {uri!r}: {why}",
            hint="write nbd+unix:///?socket=/run/disk.sock or nbd://127.0.0.1:10809",
        )

    parts = urlsplit(uri)
    if parts.path not in {"", "/"} or parts.fragment or parts.username is not None:
        raise refuse("it must not name an export or a user")
    parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme == "nbd+unix":
        path = parameters.pop("socket", "")
        if not path or parts.netloc:
            raise refuse("it needs ?socket=PATH and no host")
        if parameters:
            raise refuse(f"the parameter {next(iter(parameters))!r} is unknown")
        if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
            raise refuse(f"the path is longer than {LONGEST_SOCKET_PATH} bytes")
        return Address(path=path)
    if parts.scheme == "nbd":
        if parameters:
            raise refuse(f"the parameter {next(iter(parameters))!r} is unknown")
        try:
            port = _PORT if parts.port is None else parts.port
        except ValueError as error:
            raise refuse("the port is not a number from 0 to 65535") from error
        if not parts.hostname:
            raise refuse("it needs a host")
        return Address(host=parts.hostname, port=port)
    raise refuse("the scheme is neither nbd nor nbd+unix")


def private_address(name: str) -> Address:
    """A new socket in the runtime directory, after sockets of servers that died are removed."""
    for path in runtime_directory().glob("*.sock"):
        is_alive(path)
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:40]
    return Address(path=str(runtime_directory() / f"{safe}-{secrets.token_hex(4)}.sock"))


def bind(address: Address) -> tuple[socket.socket, Address]:
    """A listening socket, and the address with the port that was chosen.

    Raises:
        InUseError: another process listens there already.
        HostIOError: the socket cannot be bound.
    """
    try:
        if address.path is not None:
            return listen_unix(address.path), address
        family, _, _, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener, Address(host=address.host, port=listener.getsockname()[1])
    except OSError as error:
        if isinstance(error, InUseError):
            raise
        shown = address.path or f"{address.host}:{address.port}"
        kind = InUseError if error.errno == errno.EADDRINUSE else HostIOError
        raise kind(f"cannot listen there: {error.strerror or error}", path=shown) from error


class Listener:
    """A listening socket.

    Args:
        listen: a URI, or a socket that listens already and is not removed at the end. None makes a
            private unix socket.
        name: of the export that the private socket is named after.

    Attributes:
        address: where it listens, with the port that was chosen.

    Raises:
        InvalidArgumentError, InUseError, HostIOError: it cannot listen.
    """

    def __init__(self, listen: str | socket.socket | None, name: str) -> None:
        self._removes = not isinstance(listen, socket.socket)
        if isinstance(listen, socket.socket):
            self._socket, self.address = listen, address_of(listen)
        else:
            address = private_address(name) if listen is None else parse_address(listen)
            self._socket, self.address = bind(address)

    def accept(self) -> socket.socket:
        """Waits for a client.

        Raises:
            OSError: none can be accepted now, or :meth:`stop` was called.
        """
        return self._socket.accept()[0]

    def stop(self) -> None:
        """Refuses further clients, and wakes the thread that is blocked in :meth:`accept`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # close() does not wake it

    def close(self) -> None:
        """Closes the socket, and removes its name where it was made here."""
        self.stop()
        self._socket.close()
        path = self.address.path if self._removes else None
        if path is not None and Path(path).is_socket():
            with contextlib.suppress(OSError):
                Path(path).unlink()


def inherited_socket() -> socket.socket | None:
    """The listening socket that a service manager or libnbd handed over, or None.

    The protocol is that of systemd (sd_listen_fds(3)): environment variables announce descriptor 3.
    They are removed so that no child process uses the descriptor again.

    Raises:
        InvalidArgumentError: there are several descriptors, or it is not a listening stream socket.
    """
    pid, count = os.environ.get("LISTEN_PID"), os.environ.get("LISTEN_FDS")
    if pid != str(os.getpid()) or not count:
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if count != "1":
        raise InvalidArgumentError(
            f"{count} sockets were handed over (LISTEN_FDS); the server accepts one"
        )
    try:
        found = socket.socket(fileno=_FIRST_INHERITED)
        stream = found.type == socket.SOCK_STREAM
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    except OSError as error:
        raise InvalidArgumentError(
            f"the socket that was handed over cannot be used: {error.strerror}"
        ) from error
    if not stream or not listens:
        found.close()
        raise InvalidArgumentError("the inherited descriptor is not a listening stream socket")
    found.set_inheritable(False)
    found.setblocking(True)
    return found


def address_of(listener: socket.socket) -> Address:
    """The address at which a socket listens."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return Address(path=os.fsdecode(name))
    return Address(host=name[0], port=name[1])


def uri_of(address: Address, export: str) -> str:
    """The URI of an export at ``address``; "" is the default export."""
    name = quote(export, safe="")
    if address.path is not None:
        return f"nbd+unix:///{name}?socket={quote(address.path, safe='/')}"
    host = f"[{address.host}]" if address.host and ":" in address.host else address.host
    return f"nbd://{host}:{address.port}/{name}"
