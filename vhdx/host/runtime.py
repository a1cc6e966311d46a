# SPDX-License-Identifier: MIT
"""The runtime directory of a user, which holds the sockets of servers, and its unix sockets."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import struct
from pathlib import Path
from typing import NamedTuple

from vhdx.errors import HostIOError, InUseError, Reason

__all__ = [
    "BACKLOG",
    "CONTROL_SUFFIX",
    "LONGEST_SOCKET_PATH",
    "Peer",
    "is_alive",
    "listen_unix",
    "process_of",
    "runtime_directories",
    "runtime_directory",
]

LONGEST_SOCKET_PATH = 107
"""The largest length in bytes of the path of a unix socket (unix(7))."""

CONTROL_SUFFIX = ".control"
"""Of control sockets in the runtime directory."""

BACKLOG = 128
"""The largest number of connections that wait to be accepted."""

# For login sessions, for users without one, and for services of root; the owner is checked.
_OTHER_DIRECTORIES = ["/run/user/{}/vhdx", "/tmp/vhdx-{}", "/run/vhdx"]  # noqa: S108


_CREDENTIALS = struct.Struct("3i")  # struct ucred


class Peer(NamedTuple):
    """The process at the other end of a unix socket (unix(7), SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


def process_of(connected: socket.socket) -> Peer:
    """The process at the other end, as the kernel recorded it when the socket was connected.

    Raises:
        OSError: the socket is not a unix socket.
    """
    found = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Peer(*_CREDENTIALS.unpack(found))


def runtime_directory() -> Path:
    """The directory of this user's sockets, which is created with mode 0700 if needed.

    Raises:
        HostIOError: the directory belongs to another user, or cannot be created.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        path = Path(base) / "vhdx"
    elif os.geteuid() == 0:
        path = Path("/run/vhdx")
    else:
        path = Path(f"/tmp/vhdx-{os.geteuid()}")  # noqa: S108 - its owner is checked below
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise HostIOError(f"it cannot be created: {error.strerror}", path=path) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise HostIOError("it is not a directory of this user", reason=Reason.PERMISSION, path=path)
    if status.st_mode & 0o077:
        path.chmod(0o700)
    return path


def runtime_directories() -> list[Path]:
    """All directories where this user's servers may have sockets, :func:`runtime_directory` first.

    A login sets ``XDG_RUNTIME_DIR``, but a service manager starts servers without it.
    """
    user = os.geteuid()
    found = [runtime_directory()]
    for path in (Path(each.format(user)) for each in _OTHER_DIRECTORIES):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if path not in found and stat.S_ISDIR(status.st_mode) and status.st_uid == user:
                found.append(path)
    return found


def is_alive(path: Path) -> bool:
    """Whether a server listens on the socket; the socket of a server that has died is removed."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return False
        except BlockingIOError:
            return True  # its backlog is full
        except OSError:
            return False
    return True


def listen_unix(path: str) -> socket.socket:
    """A socket that listens at ``path``.

    Raises:
        InUseError: another server listens there.
    """
    if Path(path).is_socket() and is_alive(Path(path)):
        raise InUseError("another server listens there", path=path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # Bind to a temporary name and rename after listen(), because is_alive() removes a socket that
    # does not listen yet.
    first = f"{path}~{secrets.token_hex(2)}"
    renamed = len(os.fsencode(first)) <= LONGEST_SOCKET_PATH and not os.path.lexists(path)
    try:
        listener.bind(first if renamed else path)
        listener.listen(BACKLOG)
        if renamed:
            os.rename(first, path)
    except BaseException:
        listener.close()
        raise
    return listener
