# SPDX-License-Identifier: MIT
"""Finds the servers of this user by their control sockets, and asks them."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vhdx import lazy
from vhdx.control import wire
from vhdx.errors import InUseError, ProtocolError, Reason, VhdxError
from vhdx.host.runtime import is_alive, runtime_directories, runtime_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from vhdx.control import transport
else:
    transport = lazy.Module("vhdx.control.transport")  # HTTP is loaded where there is a server to ask

__all__ = ["Owner", "ServerInfo", "find_owner", "owners", "servers"]

_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class ServerInfo:
    """A server of this user.

    Attributes:
        socket: its control socket.
        pid: its process.
        started: seconds since 1970.
        exports: name, uri, path, key, format, virtual_size (bytes), read_only, connections.
        connections: export and counters.
        answers: False where its process is stopped or stuck, so that nothing else is known.
    """

    socket: Path
    pid: int
    started: float = 0.0
    exports: list[dict[str, Any]] = field(default_factory=list)
    connections: list[dict[str, Any]] = field(default_factory=list)
    answers: bool = True

    def stop(self, seconds: float = 60.0) -> None:
        """Asks it to end, and waits until it has closed its images.

        Raises:
            InUseError: it has not ended after ``seconds``.
        """
        with transport.answer(self.socket, "POST", "/v1/stop", {}, _ANSWER_SECONDS):
            pass
        deadline = time.monotonic() + seconds
        while self.socket.exists() and is_alive(self.socket):
            if time.monotonic() > deadline:
                raise InUseError(
                    f"process {self.pid} has not ended after {seconds:g} s", path=self.socket
                )
            time.sleep(0.02)

    def qos(self) -> dict[str, Any]:
        """What :meth:`vhdx.qos.Domain.describe` says."""
        with transport.answer(self.socket, "GET", "/v1/qos", None, _ANSWER_SECONDS) as lines:
            answer = next(lines)
        if "error" in answer:
            raise wire.error_of(answer["error"])
        return answer

    def change_qos(self, body: dict[str, Any]) -> Any:
        """Has it change what is wanted; see :func:`vhdx.control.qos.change_qos`."""
        with transport.answer(self.socket, "POST", "/v1/qos", body, _ANSWER_SECONDS) as lines:
            answer = next(lines)
        if "error" in answer:
            raise wire.error_of(answer["error"])
        return answer.get("result")

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
        *,
        progress: Callable[[int, int], None] | None = None,
        cancel: Callable[[], bool] | None = None,
        item: Callable[[Any], None] | None = None,
        **arguments: Any,
    ) -> Any:
        """Has the owner do something; returns its result, or raises its exception.

        Args:
            operation: info, map, resize, compact or snapshot.
            progress: called with what is done and what is to do.
            cancel: asked whenever there is progress; when it answers True, the owner stops.
            item: called with parts of a long result.
            arguments: of the operation.
        """
        body = {"export": self.export, "arguments": arguments}
        with transport.answer(
            self.server.socket, "POST", f"/v1/operations/{operation}", body, None
        ) as lines:
            for line in lines:
                if "error" in line:
                    raise wire.error_of(line["error"])
                if "result" in line:
                    return line["result"]
                if "progress" in line and progress is not None:
                    progress(*line["progress"])
                elif "item" in line and item is not None:
                    item(line["item"])
                if cancel is not None and cancel():
                    raise VhdxError("it was cancelled", reason=Reason.CANCELLED)
        raise ProtocolError("the server ended before its answer", path=self.server.socket)


def servers(*, everywhere: bool = False) -> list[ServerInfo]:
    """The servers of this user, oldest first; sockets of dead ones are removed.

    Args:
        everywhere: those too that were started with another ``XDG_RUNTIME_DIR``, or without.
    """
    found = []
    directories = runtime_directories() if everywhere else [runtime_directory()]
    for path in sorted(x for each in directories for x in each.glob(f"*{wire.SUFFIX}")):
        if not is_alive(path):
            continue
        pid = int(path.name.partition("-")[0])
        try:
            with transport.answer(path, "GET", "/v1/server", None, _ANSWER_SECONDS) as lines:
                facts = next(lines)
            wanted = {"pid", "started", "exports", "connections"}
            found.append(ServerInfo(path, **{k: v for k, v in facts.items() if k in wanted}))
        except (VhdxError, StopIteration):
            if is_alive(path):  # else it ended just now
                found.append(ServerInfo(path, pid, answers=False))
    return sorted(found, key=lambda server: (server.started, server.pid))


def owners(path: str | os.PathLike[str], *, by_name: bool = False) -> list[Owner]:
    """The servers of this user that serve the image at ``path``.

    Args:
        path: of the image.
        by_name: also those that serve what had this name when they opened it.
    """
    key: list[int] | None = None
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        key = [status.st_dev, status.st_ino]
    name = os.path.abspath(os.fsdecode(path))
    return [
        Owner(server, export["name"])
        for server in servers(everywhere=True)
        for export in server.exports
        if export["key"] == key or (by_name and export["path"] == name)
    ]


def find_owner(path: str | os.PathLike[str]) -> Owner | None:
    """The server of this user that serves the image at ``path``, or None."""
    try:
        found = owners(path)
    except VhdxError:
        return None  # no place where servers could be found
    return found[0] if found else None
