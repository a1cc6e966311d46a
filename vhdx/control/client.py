# SPDX-License-Identifier: MIT
"""Finds the servers of this user by their control sockets, and asks them."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhdx import lazy
from vhdx.errors import InUseError, NotFoundError, ProtocolError, Reason, VhdxError
from vhdx.host.runtime import is_alive, runtime_directories, runtime_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from vhdx.control import api, transport
    from vhdx.qos import QosReport
else:  # JSON and HTTP are loaded where there is a server to ask
    api = lazy.Module("vhdx.control.api")
    transport = lazy.Module("vhdx.control.transport")

__all__ = ["Owner", "ServerInfo", "find_owner", "owners", "servers"]

_ANSWER_SECONDS = 5.0
_SUFFIX = ".control"  # as vhdx.control.api has it, which is not loaded only to find nothing


@dataclass(frozen=True)
class ServerInfo:
    """A server of this user.

    Attributes:
        socket: its control socket.
        pid: its process.
        started: seconds since 1970.
        exports, connections: what it serves.
        problem: why nothing more than its process is known; None where it answers.
        is_other_version: whether the problem is that it speaks another version.
    """

    socket: Path
    pid: int
    started: float = 0.0
    exports: tuple[api.ExportReport, ...] = ()
    connections: tuple[api.ConnectionReport, ...] = ()
    problem: str | None = None
    is_other_version: bool = False

    @property
    def answers(self) -> bool:
        """Whether it can be asked: it is not stuck, and speaks the same version."""
        return self.problem is None

    def _ask(self, method: str, target: str, body: object = None) -> Any:
        if self.problem is not None:
            raise ProtocolError(f"process {self.pid} {self.problem}", path=self.socket)
        target = f"/v{api.VERSION}{target}"
        return transport.ask(self.socket, method, target, body, _ANSWER_SECONDS)

    def stop(self, seconds: float = 60.0) -> None:
        """Asks it to end, and waits until it has closed its images.

        Raises:
            InUseError: it has not ended after ``seconds``.
            ProtocolError: it does not answer, or speaks another version.
        """
        self._ask("POST", "/stop", {})
        deadline = time.monotonic() + seconds
        while self.socket.exists() and is_alive(self.socket):
            if time.monotonic() > deadline:
                raise InUseError(
                    f"process {self.pid} has not ended after {seconds:g} s", path=self.socket
                )
            time.sleep(0.02)

    def qos(self) -> QosReport:
        """What its disks want and get; see :meth:`vhdx.qos.Domain.report`."""
        from vhdx.qos import QosReport

        return api.decode_reply(self._ask("GET", "/qos"), QosReport)

    def subscribe(self, seconds: float | None = None) -> None:
        """Has figures sampled for so long; see :meth:`vhdx.qos.Domain.subscribe`."""
        from vhdx.qos import SUBSCRIPTION_SECONDS

        wanted = SUBSCRIPTION_SECONDS if seconds is None else seconds
        self._ask("POST", "/qos/subscription", api.Subscribe(wanted))

    def set_disk(
        self, name: str, settings: dict[str, int | None], policy: str | None = None
    ) -> api.DiskChanged:
        """Changes what is wanted of a disk; see :meth:`vhdx.qos.Domain.set_disk`."""
        change = api.ChangeDisk(name, settings, policy)
        return api.decode_reply(self._ask("POST", "/qos", change), api.DiskChanged)

    def set_policy(self, change: api.ChangePolicy) -> api.PolicyChanged:
        """Makes or changes a policy."""
        return api.decode_reply(self._ask("POST", "/qos", change), api.PolicyChanged)

    def remove_policy(self, name: str) -> list[str]:
        """Removes a policy; returns the names of the disks that had it."""
        found = self._ask("POST", "/qos", api.RemovePolicy(name))
        return api.decode_reply(found, api.PolicyRemoved).disks

    def metrics(self) -> str:
        """What Prometheus would scrape."""
        return transport.get_text(self.socket, "/metrics", _ANSWER_SECONDS)


@dataclass(frozen=True)
class Owner:
    """A server that holds an image, and the export that it is."""

    server: ServerInfo
    export: str

    def ask(
        self,
        operation: str,
        arguments: object = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
        item: Callable[[Any], None] | None = None,
    ) -> Any:
        """Has the owner do something; returns its result, or raises its exception.

        Args:
            operation: info, map, resize, compact or snapshot.
            arguments: of the operation, as :mod:`vhdx.control.api` has them.
            progress: called with what is done and what is to do.
            cancel: asked whenever there is progress; when it answers True, the owner stops.
            item: called with parts of a long result.
        """
        body = {"export": self.export, "arguments": {} if arguments is None else arguments}
        target = f"/v{api.VERSION}/operations/{operation}"
        with transport.lines_of(self.server.socket, "POST", target, body, None) as lines:
            for line in lines:
                if "error" in line:
                    raise api.decode_reply(line["error"], api.ErrorReport).exception()
                if "result" in line:
                    return line["result"]
                if "progress" in line and progress is not None:
                    progress(*line["progress"])
                elif "item" in line and item is not None:
                    item(line["item"])
                if cancel is not None and cancel():
                    raise VhdxError("it was cancelled", reason=Reason.CANCELLED)
        raise ProtocolError("the server ended before its answer", path=self.server.socket)


def _known(path: Path) -> ServerInfo:
    """What the server with that control socket says of itself."""
    pid = int(path.name.partition("-")[0])
    try:
        found = transport.ask(path, "GET", f"/v{api.VERSION}/server", None, _ANSWER_SECONDS)
        report = api.decode_reply(found, api.ServerReport)
    except NotFoundError:
        return ServerInfo(path, pid, problem=_other_version(path, pid), is_other_version=True)
    exports, connections = tuple(report.exports), tuple(report.connections)
    return ServerInfo(path, report.pid, report.started, exports, connections)


def _other_version(path: Path, pid: int) -> str:
    """How a server and this client do not fit together."""
    theirs, package = 1, "an older vhdx"  # the first version could not be asked
    with contextlib.suppress(NotFoundError):
        found = transport.ask(path, "GET", "/version", None, _ANSWER_SECONDS)
        version = api.decode_reply(found, api.VersionReport)
        theirs, package = version.control, f"vhdx {version.vhdx}"
    return (
        f"speaks version {theirs} of the control interface ({package}), and this vhdx version "
        f"{api.VERSION}: use the vhdx that started it, or end it with kill -TERM {pid}"
    )


def servers(*, everywhere: bool = False) -> list[ServerInfo]:
    """The servers of this user, oldest first; sockets of dead ones are removed.

    Args:
        everywhere: those too that were started with another ``XDG_RUNTIME_DIR``, or without.
    """
    found = []
    directories = runtime_directories() if everywhere else [runtime_directory()]
    for path in sorted(x for each in directories for x in each.glob(f"*{_SUFFIX}")):
        if not is_alive(path):
            continue
        try:
            found.append(_known(path))
        except VhdxError:
            if is_alive(path):  # else it ended just now
                pid = int(path.name.partition("-")[0])
                stuck = "does not answer: it is stopped, or stuck"
                found.append(ServerInfo(path, pid, problem=stuck))
    return sorted(found, key=lambda server: (server.started, server.pid))


def _owners(path: str | os.PathLike[str], among: list[ServerInfo], *, by_name: bool) -> list[Owner]:
    key: tuple[int, int] | None = None
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        key = status.st_dev, status.st_ino
    name = os.path.abspath(os.fsdecode(path))
    return [
        Owner(server, export.name)
        for server in among
        for export in server.exports
        if export.key == key or (by_name and export.path == name)
    ]


def owners(path: str | os.PathLike[str], *, by_name: bool = False) -> list[Owner]:
    """The servers of this user that serve the image at ``path``.

    Args:
        path: of the image.
        by_name: also those that serve what had this name when they opened it.
    """
    return _owners(path, servers(everywhere=True), by_name=by_name)


def find_owner(path: str | os.PathLike[str]) -> Owner | None:
    """The server of this user that serves the image at ``path``, or None.

    Raises:
        ProtocolError: none is known to serve it, but a server of another version may.
    """
    try:
        known = servers(everywhere=True)
    except VhdxError:
        return None  # no place where servers could be found
    found = _owners(path, known, by_name=False)
    if found:
        return found[0]
    for server in known:
        if server.is_other_version:
            raise ProtocolError(
                f"it is in use, maybe by process {server.pid}, which {server.problem}", path=path
            )
    return None
