# SPDX-License-Identifier: MIT
"""Finds the servers of this user by their control sockets, and sends them requests."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhdx import lazy, place
from vhdx.errors import InUseError, ProtocolError, Reason, VhdxError
from vhdx.host.runtime import CONTROL_SUFFIX, is_alive, runtime_directories, runtime_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from vhdx.control import api, transport
    from vhdx.qos import QosReport
else:  # JSON and HTTP are loaded only when there is a server to ask
    api = lazy.Module("vhdx.control.api")
    transport = lazy.Module("vhdx.control.transport")

__all__ = ["Owner", "ServerInfo", "find_owner", "owners", "servers", "suspects"]

_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class ServerInfo:
    """A server of this user.

    Attributes:
        socket: its control socket.
        pid: its process id.
        report: what it serves; None if it does not answer.
        problem: why only its process id is known; None if the server answers.
    """

    socket: Path
    pid: int
    report: api.ServerReport | None = None
    problem: str | None = None

    @property
    def started(self) -> float:
        """Seconds since 1970; 0 if that is not known."""
        return 0.0 if self.report is None else self.report.started

    @property
    def exports(self) -> list[api.ExportReport]:
        """The disks that it serves, as far as that is known."""
        return [] if self.report is None else self.report.exports

    @property
    def connections(self) -> list[api.ConnectionReport]:
        """The counters of its connections, as far as they are known."""
        return [] if self.report is None else self.report.connections

    @property
    def answers(self) -> bool:
        """Whether it answers requests."""
        return self.problem is None

    @property
    def refusal(self) -> str | None:
        """Why it cannot be asked for more than to stop: its problem or its version; else None."""
        if self.report is None or self.report.control == api.VERSION:
            return self.problem
        return (
            f"speaks version {self.report.control} of the control interface (vhdx "
            f"{self.report.vhdx}), and this vhdx version {api.VERSION}: use the vhdx that started it"
            f"{_program(self.pid)}, or vhdx stop"
        )

    def target(self, path: str) -> str:
        """The path of a request in the present version.

        Raises:
            ProtocolError: the server speaks another version, or does not answer.
        """
        if self.refusal is not None:
            raise ProtocolError(f"process {self.pid} {self.refusal}", path=self.socket)
        return f"/v{api.VERSION}{path}"

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        return transport.ask(self.socket, method, self.target(path), body, _ANSWER_SECONDS)

    def stop(self, seconds: float = 60.0) -> None:
        """Asks the server, of any version, to end, and waits until it has closed its images.

        Raises:
            InUseError: the server has not ended after ``seconds``.
            ProtocolError: the server does not answer.
        """
        transport.ask(self.socket, "POST", "/v1/stop", {}, _ANSWER_SECONDS)
        deadline = time.monotonic() + seconds
        while self.socket.exists() and is_alive(self.socket):
            if time.monotonic() > deadline:
                raise InUseError(
                    f"process {self.pid} has not ended after {seconds:g} s", path=self.socket
                )
            time.sleep(0.02)

    def qos(self) -> QosReport:
        """The QoS report of the server; see :meth:`vhdx.qos.Domain.report`."""
        from vhdx.qos import QosReport

        return api.decode_reply(self._ask("GET", "/qos"), QosReport)

    def subscribe(self, seconds: float | None = None) -> None:
        """Keeps sampling on for ``seconds``; see :meth:`vhdx.qos.Domain.subscribe`."""
        from vhdx.qos import SUBSCRIPTION_SECONDS

        wanted = SUBSCRIPTION_SECONDS if seconds is None else seconds
        self._ask("POST", "/qos/subscription", api.Subscribe(wanted))

    def set_disk(
        self, name: str, settings: dict[str, int | None], policy: str | None = None
    ) -> api.DiskChanged:
        """Changes the QoS settings of a disk; see :meth:`vhdx.qos.Domain.set_disk`."""
        change = api.ChangeDisk(name, settings, policy)
        return api.decode_reply(self._ask("POST", "/qos", change), api.DiskChanged)

    def set_policy(self, change: api.ChangePolicy) -> api.PolicyChanged:
        """Creates or changes a policy."""
        return api.decode_reply(self._ask("POST", "/qos", change), api.PolicyChanged)

    def remove_policy(self, name: str) -> list[str]:
        """Removes a policy; returns the names of the disks that had it."""
        found = self._ask("POST", "/qos", api.RemovePolicy(name))
        return api.decode_reply(found, api.PolicyRemoved).disks

    def metrics(self) -> str:
        """The metrics of the server, in Prometheus' text format."""
        return transport.get_text(self.socket, "/metrics", _ANSWER_SECONDS)


@dataclass(frozen=True)
class Owner:
    """A server that holds an image, and the name of the export of that image."""

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
        """Runs an operation in the owner; returns its result, or raises its exception.

        Args:
            operation: info, map, resize, compact or snapshot.
            arguments: arguments of the operation, as defined in :mod:`vhdx.control.api`.
            progress: called with the work done and the total.
            cancel: called after each progress report or item; True cancels the operation.
            item: called with each part of a long result.
        """
        body = {"export": self.export, "arguments": {} if arguments is None else arguments}
        target = self.server.target(f"/operations/{operation}")
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
                    raise VhdxError("the operation was cancelled", reason=Reason.CANCELLED)
        raise ProtocolError("the server ended before it answered", path=self.server.socket)


def _known(path: Path) -> ServerInfo:
    """Asks the server at that control socket for its description."""
    found = transport.ask(path, "GET", "/v1/server", None, _ANSWER_SECONDS)
    report = api.decode_reply(found, api.ServerReport)
    return ServerInfo(path, report.pid, report)


def _pid_of(path: Path) -> int | None:
    """The process in the name of a control socket, PID-RANDOM.control."""
    pid = path.name.partition("-")[0]
    return int(pid) if pid.isdecimal() and pid.isascii() else None


def _program(pid: int) -> str:
    """The program that a process was started as, in brackets; nothing if that is not known."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        for word in words[:2]:  # an interpreter comes first
            if os.path.basename(word) == b"vhdx":
                return f" ({os.fsdecode(word)})"
    return ""


def servers(*, everywhere: bool = False) -> list[ServerInfo]:
    """The servers of this user, oldest first; sockets of servers that have died are removed.

    Args:
        everywhere: include servers that were started with another ``XDG_RUNTIME_DIR`` or none.
    """
    found = []
    directories = runtime_directories() if everywhere else [runtime_directory()]
    for path in sorted(x for each in directories for x in each.glob(f"*-*{CONTROL_SUFFIX}")):
        pid = _pid_of(path)
        if pid is None or not is_alive(path):
            continue  # it is not the name of a server's socket, or nothing listens there
        try:
            found.append(_known(path))
        except VhdxError as error:
            if is_alive(path):  # otherwise the server ended meanwhile
                timeout = isinstance(error.__cause__, TimeoutError)
                problem = "does not answer: it is suspended or hangs"
                if not timeout:
                    problem = f"cannot be asked: {error.message}"
                found.append(ServerInfo(path, pid, problem=problem))
    return sorted(found, key=lambda server: (server.started, server.pid))


def _owners(path: str | os.PathLike[str], among: list[ServerInfo], *, by_name: bool) -> list[Owner]:
    importlib.import_module("vhdx.image.host")  # makes the host's files known; it takes a moment
    in_pool = not place.is_host(path)  # the owner of the pool has it, so its files have no key here
    key = None if in_pool else place.key_of(path)
    name = place.spelled(path) if in_pool else os.path.abspath(os.fsdecode(path))
    return [
        Owner(server, export.name)
        for server in among
        for export in server.exports
        if (not in_pool and export.key == key)
        or ((by_name or in_pool) and place.spelled(export.path) == name)
    ]


def owners(path: str | os.PathLike[str], *, by_name: bool = False) -> list[Owner]:
    """The servers of this user that serve the image at ``path``.

    Args:
        path: the path of the image.
        by_name: also match servers whose image had this path when they opened it.
    """
    return _owners(path, servers(everywhere=True), by_name=by_name)


def find_owner(path: str | os.PathLike[str]) -> Owner | None:
    """The server of this user that serves the image at ``path``, or None."""
    try:
        found = owners(path)
    except VhdxError:
        return None  # there is no runtime directory
    return found[0] if found else None


def suspects() -> str | None:
    """Servers that cannot be asked what they serve, and why; None if there is none."""
    with contextlib.suppress(VhdxError):
        found = [f"process {x.pid} {x.problem}" for x in servers(everywhere=True) if x.problem]
        if found:
            return "it may be served: " + "; ".join(found)
    return None
